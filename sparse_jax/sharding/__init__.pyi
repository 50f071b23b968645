from .mesh import MeshShape as MeshShape
from .mesh import make_mesh as make_mesh
from .mesh import parse_mesh as parse_mesh
from .placement import Placement as Placement
from .runner import MeshRunner as MeshRunner
