"""clip-retrieval's back end over a FAISS index and Parquet metadata, for `other_engines.py`; run in the environment of the other engines.

    OTHERS/bin/python benchmarks/serving/clip_retrieval_server.py FOLDER PORT EF

Its own service, providers and Flask server, as its `clip_back` starts them; only its model is not loaded, because queries are vectors. The
package's `__init__` imports its training tools too (wandb, torch): it is passed over.
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
    sys.modules.setdefault(
        "torch", types.ModuleType("torch")
    )  # imported for each query, used for none by vector
    from clip_retrieval import clip_back as theirs

    index = faiss.read_index(f"{folder}/index.faiss")
    index.hnsw.efSearch = ef
    nothing = dict.fromkeys(theirs.ClipResource.__dataclass_fields__)
    resource = theirs.ClipResource(
        **{
            **nothing,
            "metadata_provider": theirs.ParquetMetadataProvider(str(Path(folder) / "metadata")),
            "image_index": index,
            "columns_to_return": ["caption"],
            "metadata_is_ordered_by_ivf": False,
        }
    )
    app = Flask(__name__)
    Api(app).add_resource(
        theirs.KnnService, "/knn-service", resource_class_kwargs={"clip_resources": {"bench": resource}}
    )
    app.run(host="127.0.0.1", port=port, debug=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
