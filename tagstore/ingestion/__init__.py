"""Ingest: pairs from a source become a version of a store.

doors ──Pairs──▶ batches ──decoded──▶ pipeline ──▶ Report

`doors` takes what a person or a program has, `batches` decodes, `pipeline` embeds, mines and commits.
"""

from tagstore.ingestion.doors import ingest, ingest_pairs
from tagstore.ingestion.report import Report

__all__ = ["Report", "ingest", "ingest_pairs"]
