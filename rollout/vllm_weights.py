"""New weights into a running vLLM model, in place."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def reload_weights(runner: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replaces a model runner's weights by `tensors`, named as in the Hugging Face checkpoint.

    vLLM 0.32 reloads a layer at a time and passes over an output head that is tied to the embedding; on a CPU that head
    holds a packed copy of the old embedding, and logits would come from it. It is tied and packed again here.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    model = runner.get_model()
    modules = list(model.modules())
    embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    tied = [
        (head, embedding)
        for head in modules
        if isinstance(head, ParallelLMHead)
        for embedding in embeddings
        if head.weight is embedding.weight
    ]
    runner.reload_weights(weights_iterator=iter(tensors))
    for head, embedding in tied:
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
