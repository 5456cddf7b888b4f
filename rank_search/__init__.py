"""rank_search: automated rank search for low-rank compression of Transformers.

::

    import rank_search as rs

    front = rs.run("study.toml")                     # create or resume, search, keep the front
    file = rs.export("study.toml", kept=0.6)         # one rank map, with all that remakes it
    file.write("rank_map.json", folder=".")
    rs.apply("rank_map.json", "compressed")          # a checkpoint that transformers loads

Nothing heavy is imported before a function needs it.
"""

from rank_search.api import (
    Evaluation,
    ModelLayers,
    StudyView,
    allocate,
    apply,
    evaluate,
    explain,
    export,
    front,
    layers,
    prepare,
    run,
    status,
    view,
)
from rank_search.client import Client
from rank_search.errors import RankSearchError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.spec import DataSpec, ModelSpec, StudyFile, StudySpec, TargetSpec, load_study_file

__all__ = [
    "Client",
    "DataSpec",
    "Evaluation",
    "Fidelity",
    "Front",
    "FrontPoint",
    "LayerShape",
    "Measurement",
    "ModelLayers",
    "ModelSpec",
    "RankMap",
    "RankMapFile",
    "RankSearchError",
    "RankSpace",
    "StudyFile",
    "StudySpec",
    "StudyView",
    "TargetSpec",
    "allocate",
    "apply",
    "evaluate",
    "explain",
    "export",
    "front",
    "layers",
    "load_study_file",
    "prepare",
    "run",
    "status",
    "view",
]
