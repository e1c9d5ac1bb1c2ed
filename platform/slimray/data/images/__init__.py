"""Images: readers, layouts, generated datasets."""
