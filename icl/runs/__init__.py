"""One run on disk: its folder, checkpoints and measurements, who may write them, and their copy in a store."""
