"""Arrays in files, read piece by piece and never whole: .npy, .npz, .safetensors, .parquet, .arrow, .feather.

`open_arrays` takes what the command line takes: a path, a folder, a pattern, each with the name of an array inside.
`Dataset` puts predictions, targets, weights, masks and group labels side by side and cuts them into slices.
"""

from lossgrad.files.array_file import ArrayFile, Elements, FileError
from lossgrad.files.dataset import SLICE_ELEMENTS, Dataset, NanFound, NanPolicy, Piece
from lossgrad.files.opening import open_arrays
from lossgrad.files.shards import DatasetFiles

__all__ = [
    "SLICE_ELEMENTS",
    "ArrayFile",
    "Dataset",
    "DatasetFiles",
    "Elements",
    "FileError",
    "NanFound",
    "NanPolicy",
    "Piece",
    "open_arrays",
]
