"""Videos: decoding, clips and their augmentation."""
