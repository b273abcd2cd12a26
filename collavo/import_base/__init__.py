"""Other people's checkpoints as bases of this project: `python -m collavo.import_base --help`.

`published`            find a checkpoint, read its configuration, tensors and tokenizer
`assemble`             a LLaVA, or a vision encoder and a language model, as one CoLLaVO model
`internlm`             InternLM's weights and configuration under Llama's names
`internlm_tokenizer`   InternLM's tokenizer from its `tokenizer.model`
`release`              the authors' CoLLaVO-7B
"""
