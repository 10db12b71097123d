"""A store on disk: LMDB is the truth, and only this room knows its tables."""
