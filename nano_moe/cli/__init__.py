"""One small file per verb: parse, call, print. No tensors here, and no slow import at the top."""
