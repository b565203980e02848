"""What a run leaves behind: model folders and their cards."""
