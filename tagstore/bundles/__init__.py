"""Bundles: one version of a store as one file, to share, to keep, or to restore. Format: `docs/bundles.md`.

    manifest.json     what this is, and the size and sha256 of every file below
    manifest.sig      Ed25519 signature of manifest.json, if it is signed
    tags.jsonl        the vocabulary
    embeddings.f16    its text embeddings
    entries.jsonl     the entries
    vectors.f16       their image vectors

A bundle holds all that answers depend on and keeps ids and order, so an imported store answers as the
exported one did. The same version gives the same bytes. The index is derived and built again. A store holds
no images, so they are in a bundle only on demand.
"""

from tagstore.bundles.exporting import export
from tagstore.bundles.importing import import_, inspect
from tagstore.bundles.manifest import BundleInfo

__all__ = ["BundleInfo", "export", "import_", "inspect"]
