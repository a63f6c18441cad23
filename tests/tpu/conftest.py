import os

# Read when libtpu is loaded: there is no metadata server to ask about a TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
