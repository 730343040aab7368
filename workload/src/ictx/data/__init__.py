"""From text files to token arrays, and from those to batches."""
