"""The CoLLaVO model as a transformers family; importing it registers it with the Auto classes."""

from collavo.model.configuration_collavo import CollavoConfig
from collavo.model.modeling_collavo import CollavoForConditionalGeneration, CollavoModel

__all__ = ["CollavoConfig", "CollavoForConditionalGeneration", "CollavoModel"]
