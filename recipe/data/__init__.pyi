from .augment import View as View, draw_views as draw_views, evaluation_short_side as evaluation_short_side
from .batch import Batch as Batch, HostBatch as HostBatch
from .contents import look as look
from .datasets import BadImageError as BadImageError, ImageDataset as ImageDataset, Samples as Samples
from .decoding import UNREADABLE as UNREADABLE, decode as decode
from .device_decoding import (
    Decoder as Decoder,
    EncodedImages as EncodedImages,
    NvJpeg as NvJpeg,
    open_decoder as open_decoder,
)
from .digits import open_digits as open_digits
from .folder_index import (
    IMG_EXTENSIONS as IMG_EXTENSIONS,
    FolderIndex as FolderIndex,
    index_folder as index_folder,
    list_imagefolder as list_imagefolder,
)
from .held import HeldImages as HeldImages
from .huggingface_index import is_hub_name as is_hub_name
from .image_files import ImageFiles as ImageFiles
from .loader import (
    PREFETCHED as PREFETCHED,
    TrainLoader as TrainLoader,
    ValidationLoader as ValidationLoader,
    WorkerError as WorkerError,
)
from .mixing import open_mixing as open_mixing
from .pack import PackedImages as PackedImages, open_pack as open_pack
from .pack_format import (
    HEADER as HEADER,
    IMAGE as IMAGE,
    IMAGES as IMAGES,
    NAMES as NAMES,
    RAW_IMAGE as RAW_IMAGE,
    BadImage as BadImage,
    File as File,
    Header as Header,
    Making as Making,
    Part as Part,
    damage as damage,
    describe as describe,
    open_index as open_index,
    read_header as read_header,
    sha256_of as sha256_of,
    shard_name as shard_name,
)
from .sampler import Keys as Keys, epoch_permutation as epoch_permutation
from .seeds import derive_seed as derive_seed
from .sources import (
    open_datasets as open_datasets,
    open_samples as open_samples,
    open_validation as open_validation,
    recognise as recognise,
)
from .synthetic import SyntheticImages as SyntheticImages
