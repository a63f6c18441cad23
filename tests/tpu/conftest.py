import os

# Read when libtpu is loaded: no metadata server is asked about a TPU, no lock is taken of one.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
