from .errors import InputError as InputError
from .transforms.sift import SiftState as SiftState
from .transforms.sift import sift as sift
