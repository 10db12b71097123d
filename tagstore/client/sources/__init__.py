"""What answers behind a source: servers, directories, recorded maps, controls."""
