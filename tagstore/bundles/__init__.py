"""Bundles: one version of a store as one file, to hand on, to keep, or to bring back. `docs/bundles.md` describes the format.

    manifest.json     what this is, and the size and sha256 of every file below
    manifest.sig      Ed25519 signature of manifest.json, if it is signed
    tags.jsonl        the vocabulary
    embeddings.f16    its text embeddings
    entries.jsonl     the entries
    vectors.f16       their image vectors

A bundle holds what answers depend on: ids, order and numbers are kept, so an imported store answers as the exported one did.
The same version gives the same bytes. What is derived (the index) is made anew; images are in no store, so in no bundle.
"""

from tagstore.bundles.exporting import export
from tagstore.bundles.importing import import_, inspect
from tagstore.bundles.manifest import BundleInfo

__all__ = ["BundleInfo", "export", "import_", "inspect"]
