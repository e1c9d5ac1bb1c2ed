"""Search strategies, encodings of archs, the accuracy predictor."""
