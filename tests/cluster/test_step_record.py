"""What the driver says of a step beside what the learner says."""

from cluster.step_record import silent_sources
from services.records import Failure, Group, PolicyVersion, Prompt, Sample, Score

OK = Score(status="ok", value=1.0)
TOO_LONG = Score(status="failed", error=Failure(kind="data", code="input_too_long", message="146 tokens, at most 128"))


def group_of(*scores: dict[str, Score], reward: Score = OK) -> Group:
    samples = tuple(
        Sample(
            sample_id=f"0:p:{k}", group_id="0:p", prompt_id="p", attempt=1, policy_versions=((1, 0, 1),), prompt="p",
            prompt_ids=(1,), response="r", response_ids=(2,), finish_reason="stop", logprobs=(-1.0,), scores=each,
            reward=reward, created_at=0.0,
        )
        for k, each in enumerate(scores)
    )  # fmt: skip
    prompt = Prompt(prompt_id="p", source="test", text="x")
    return Group(
        group_id="0:p", attempt=1, epoch=0, order=0, version=PolicyVersion(1, 0), prompt=prompt, eos_ids=(2,),
        samples=samples,
    )  # fmt: skip


def test_a_source_that_scores_nothing_is_named_with_its_reason() -> None:
    both = {"attention": OK, "judge": TOO_LONG}
    assert silent_sources([group_of(both, both)]) == {"judge": "input_too_long: 146 tokens, at most 128"}
    assert silent_sources([group_of(both, {"attention": OK, "judge": OK})]) == {}


def test_samples_without_a_reward_say_nothing_of_their_sources() -> None:
    assert silent_sources([group_of({"judge": TOO_LONG}, reward=TOO_LONG)]) == {}
