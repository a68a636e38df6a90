"""The engine: ColossalAI's plugins behind one small interface."""

from trainer.engine.engine import Engine, join_processes
from trainer.engine.settings import EngineSettings, OptimizerSettings

__all__ = ["Engine", "EngineSettings", "OptimizerSettings", "join_processes"]
