"""What each stage can be told: one frozen dataclass per stage, a doc string for each field, validated once.

The command line, YAML files and Python callers all build these. A wrong value raises ValueError naming the
field.
"""

from .arguments import from_arguments, from_dict
from .checks import BATCH_CHUNKS, BATCH_TOKENS, MICRO_BATCH_TOKENS, SHARD_CHUNKS
from .data import PrepareConfig, RetokenizeConfig, ScoreConfig, SynthesizeConfig
from .fields import shown
from .proxy import NgramConfig, ProxyFitConfig, ProxyScoreConfig, TransformerConfig
from .publishing import (
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    ExportDataConfig,
    GenerateConfig,
    LedgerConfig,
    ReportConfig,
    RunConfig,
)
from .selection import SelectConfig
from .training import (
    MAX_STEPS,
    CheckpointConfig,
    DistillConfig,
    EvalConfig,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TokensConfig,
    TrainConfig,
)
from .yaml_files import read_mapping

# stage → its settings; stage X is the function X of miniplm.stages.X. X_Y is the command `miniplm X Y`
STAGES = {
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "proxy_fit": ProxyFitConfig,
    "proxy_score": ProxyScoreConfig,
    "select": SelectConfig,
    "retokenize": RetokenizeConfig,
    "synthesize": SynthesizeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "export_data": ExportDataConfig,
}

__all__ = [
    "BATCH_CHUNKS",
    "BATCH_TOKENS",
    "MAX_STEPS",
    "MICRO_BATCH_TOKENS",
    "SHARD_CHUNKS",
    "STAGES",
    "CheckpointConfig",
    "DemoConfig",
    "DistillConfig",
    "EvalConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportDataConfig",
    "GenerateConfig",
    "LedgerConfig",
    "NgramConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrepareConfig",
    "ProxyFitConfig",
    "ProxyScoreConfig",
    "ReportConfig",
    "RetokenizeConfig",
    "RunConfig",
    "ScoreConfig",
    "SelectConfig",
    "StudentConfig",
    "SynthesizeConfig",
    "TokensConfig",
    "TrainConfig",
    "TransformerConfig",
    "from_arguments",
    "from_dict",
    "read_mapping",
    "shown",
]
