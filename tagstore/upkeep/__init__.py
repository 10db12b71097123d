"""What is done to a store that is there: edits, compaction, takedown, verification, index tuning."""
