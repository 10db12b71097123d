"""clip-retrieval's back end over a FAISS index and Parquet metadata, for `other_engines.py`.

    OTHERS/bin/python benchmarks/serving/clip_retrieval_server.py FOLDER PORT EF

It has clip-retrieval's own service, providers and Flask server, started as its `clip_back` does. Only the
model is not loaded, because queries are vectors. The package's `__init__` imports training tools (wandb,
torch) and is skipped.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import faiss
from flask import Flask
from flask_restful import Api


def main(folder: str, port: int, ef: int) -> None:
    spec = importlib.util.find_spec("clip_retrieval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("clip_retrieval is not installed")
    package = types.ModuleType("clip_retrieval")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["clip_retrieval"] = package
    # imported for each query, used for none by vector
    sys.modules.setdefault("torch", types.ModuleType("torch"))
    from clip_retrieval import clip_back

    index = faiss.read_index(f"{folder}/index.faiss")
    index.hnsw.efSearch = ef
    no_fields = dict.fromkeys(clip_back.ClipResource.__dataclass_fields__)
    resource = clip_back.ClipResource(
        **{
            **no_fields,
            "metadata_provider": clip_back.ParquetMetadataProvider(str(Path(folder) / "metadata")),
            "image_index": index,
            "columns_to_return": ["caption"],
            "metadata_is_ordered_by_ivf": False,
        }
    )
    app = Flask(__name__)
    Api(app).add_resource(
        clip_back.KnnService, "/knn-service", resource_class_kwargs={"clip_resources": {"bench": resource}}
    )
    app.run(host="127.0.0.1", port=port, debug=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
