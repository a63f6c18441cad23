"""From JSON records and video files to batches of the two token streams; see `pipeline.build_pipeline`."""
