"""Makes the flat root importable as one package: `from voxkrikri import VoxKrikriForConditionalGeneration`.

The Hub files import each other relatively, as a Hub repository needs it. Any module with a __path__ is a package, so
setting it here lets the same files be imported without an install step and without a second copy of their classes.
"""

from pathlib import Path


__path__ = [str(Path(__file__).parent)]

from voxkrikri.configuration_voxkrikri import VoxKrikriConfig
from voxkrikri.modeling_voxkrikri import VoxKrikriForConditionalGeneration
from voxkrikri.pipeline_voxkrikri import VoxKrikriPipeline
from voxkrikri.processing_voxkrikri import VoxKrikriProcessor


__all__ = ["VoxKrikriConfig", "VoxKrikriForConditionalGeneration", "VoxKrikriPipeline", "VoxKrikriProcessor"]
