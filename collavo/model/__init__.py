"""The CoLLaVO model as a transformers family; importing it registers it with the Auto classes."""

from collavo.model.configuration import CollavoConfig
from collavo.model.modeling import CollavoForConditionalGeneration, CollavoModel
from collavo.model.processing import CollavoProcessor

__all__ = ["CollavoConfig", "CollavoForConditionalGeneration", "CollavoModel", "CollavoProcessor"]
