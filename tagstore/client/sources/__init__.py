"""The backends of a source: servers, directories, recorded maps, control experiments."""
