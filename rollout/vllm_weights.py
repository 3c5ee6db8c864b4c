"""New weights into a running vLLM model, in place: all, or at least a model that the next set can be loaded into."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def reload_weights(runner: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replaces a model runner's weights by `tensors`, named as in the Hugging Face checkpoint."""
    model = runner.get_model()
    tie = tied_heads(model)
    try:
        runner.reload_weights(weights_iterator=iter(tensors))
    except BaseException:
        end_reload(model, runner.vllm_config.model_config)
        raise
    tie()


def tied_heads(model: Any) -> Callable[[], None]:
    """What ties the output heads again that are tied now.

    vLLM 0.32 reloads a layer at a time and passes over an output head that is tied to the embedding; on a CPU that head
    holds a packed copy of the old embedding, and logits would come from it. It is tied and packed again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    tied = [
        (head, embedding)
        for head in modules
        if isinstance(head, ParallelLMHead)
        for embedding in embeddings
        if head.weight is embedding.weight
    ]

    def tie() -> None:
        for head, embedding in tied:
            head.tie_weights(embedding)
            head.quant_method.process_weights_after_loading(head)

    return tie


def end_reload(model: Any, model_config: Any) -> None:
    """Closes a reload, whether every tensor came or not.

    One that is left open keeps the tensors it has for its unfinished layers, and counts them: the next reload would
    take such a layer for complete with some of its tensors missing, and leave out those that come last. What an
    incomplete layer holds after this is of no use; the next whole set replaces it.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
