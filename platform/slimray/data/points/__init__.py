"""Point clouds: file formats, layouts, generated sets."""
