"""Make bases of other people's checkpoints: `python -m collavo.import_base --help`. The method needs nothing of this.

`published`                 find a checkpoint, read its configuration, tensors and tokenizer
`chat_templates`            read the chat format of a language model from its own template
`assemble`                  make one CoLLaVO model of a LLaVA, or of a vision encoder and a language model
`internlm`                  rename InternLM's weights and configuration to Llama's
`sentencepiece_tokenizers`  make InternLM's and Llama's tokenizers from `tokenizer.model`
`release`                   read the authors' CoLLaVO-7B
"""
