# `make demo` and `make test` do everything on a fresh machine; each sets up .venv when it is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT ?= .demo

# uv reads its own variable for what pip calls PIP_FIND_LINKS
ifneq ($(strip $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
endif
# idle OpenMP threads must sleep, not spin: on few cores FAISS and torch take the time from each other
export OMP_WAIT_POLICY := PASSIVE
# without bytecode every process compiles thousands of modules again: torch and its company load twice as long
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup lock demo test bench bench-mining bench-retrieval lint proto proto-ts proto-go clean
setup: .venv/.ready

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "this Python cannot make virtual environments: install python3-venv, or pass another, make PYTHON=..."; exit 1; }
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock | \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin

# The lock pins every version, and uv refuses a file whose hash the lock does not name. PyTorch's own indexes
# have builds of torch that the lock does not know: with UV_TORCH_BACKEND they are checked by version only.
ifneq ($(strip $(UV_TORCH_BACKEND)),)
DROP_TORCH_HASHES := /^(torch|torchvision|triton)==/,/^ *\#/{ /^ /d; s/ .*//; }
endif
.venv/.ready: pyproject.toml requirements.lock | $(BIN)/uv
	@sed -E '$(DROP_TORCH_HASHES)' requirements.lock > .venv/requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint .venv/requirements.lock \
		--build-constraint .venv/requirements.lock --require-build-hashes --editable '.[server,model,eval,qlora,api,otel,dev]'
	@touch $@

# Renew the lock after a change of pyproject.toml. Pins that still fit stay; UPGRADE='--upgrade-package ruff'
# takes the newest version of one package.
# PyPI lacks the CPU build of torch that PIP_FIND_LINKS may hold. Add its hash to the lock by hand, once for each
# version of torch: uv keeps it while the version stays. Setup refuses a new build and prints the hash to add.
lock: $(BIN)/uv
	env -u UV_FIND_LINKS -u UV_TORCH_BACKEND $(BIN)/uv pip compile --quiet --universal --generate-hashes \
		--all-extras --python-version 3.11 --annotation-style line --custom-compile-command 'make lock' \
		$(UPGRADE) --output-file requirements.lock pyproject.toml

# DATA=path takes anything that `tagstore ingest` can read instead of the default pictures
demo: setup
	$(BIN)/python scripts/demo.py $(if $(DATA),--data '$(DATA)') --out $(OUT)

test: lint
	$(BIN)/python -m pytest -n 2

# the figures of docs/mining.md, beside SceneGraphParser on the same captions in the same run
bench-mining: setup
	@test -n "$(DATA)" || { echo "make bench-mining DATA=path: the folder that holds flickr8k/, coco_mini/, captions/ ..."; exit 1; }
	$(BIN)/uv pip install --quiet --no-deps --target .bench SceneGraphParser==0.1.0 tabulate==0.9.0
	$(BIN)/python -m benchmarks.mining.quality --data '$(DATA)' --comparison .bench --docs docs/mining.md

# what the service adds to its parts; STORES=path keeps what is built for the next run, DATA=path (the folder that holds flickr8k/) for the
# figures by image, OTHERS=path of a Python that has other engines
bench-retrieval: setup
	$(BIN)/python -m benchmarks.serving.grpc_echo --seconds 1 --repeats 1
	$(BIN)/python -m benchmarks.serving.retrieval $(if $(STORES),--directory '$(STORES)') $(if $(DATA),--data '$(DATA)') $(if $(OTHERS),--others '$(OTHERS)')

# every figure of the docs; needs the data sets: make bench DATA=path (the folders flickr8k, coco_mini, ... under it)
bench: setup bench-mining
	@test -n "$(DATA)" || { echo "make bench DATA=path: the folder that holds flickr8k/, coco_mini/, captions/ ..."; exit 1; }
	$(BIN)/python -m benchmarks.store.ingest --data '$(DATA)/flickr8k'
	$(BIN)/python -m benchmarks.mining.tag_recall --data '$(DATA)/flickr8k'
	$(BIN)/python -m benchmarks.model.encoder_mini --data '$(DATA)'
	$(BIN)/python -m benchmarks.store.costs
	$(BIN)/python -m benchmarks.client.promises --data '$(DATA)/flickr8k'
	$(BIN)/python -m benchmarks.index.search
	$(BIN)/python -m benchmarks.store.crashes

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: setup
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos protos/tagstore_proto/v1/tagstore.proto

# stubs for other languages, into gen/; node and npm, or go, must be there
proto-ts: setup
	npm install --silent --no-save --no-audit --no-fund --prefix .proto-tools ts-proto@2.18.0
	mkdir -p gen/ts
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=.proto-tools/node_modules/.bin/protoc-gen-ts_proto --ts_proto_out=gen/ts --ts_proto_opt=outputServices=grpc-js,esModuleInterop=true,forceLong=string tagstore_proto/v1/tagstore.proto

GO_OPTIONS := module=tagstore,Mtagstore_proto/v1/tagstore.proto=tagstore/tagstorepb
proto-go: setup
	GOBIN=$(CURDIR)/.proto-tools/bin go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.6
	GOBIN=$(CURDIR)/.proto-tools/bin go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1
	mkdir -p gen/go
	PATH="$(CURDIR)/.proto-tools/bin:$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --go_out=gen/go --go_opt=$(GO_OPTIONS) --go-grpc_out=gen/go --go-grpc_opt=$(GO_OPTIONS) tagstore_proto/v1/tagstore.proto

clean:
	rm -rf .venv .bench .proto-tools gen $(OUT)
