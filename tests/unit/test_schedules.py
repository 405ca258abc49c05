from dapo_mcore.schedules import group_size_schedule, piecewise, temperature_schedule
from dapo_mcore.train import load_config

RUN = ["experiment=quickstart", "trainer.total_training_steps=10", "rollout.n=8", "rollout.temperature=1.0"]


def test_a_stage_holds_for_the_steps_that_begin_before_its_end():
    value = piecewise([(0.3, "first"), (0.55, "second")], "rest", total_steps=10)
    assert [value(step) for step in range(1, 11)] == ["first"] * 3 + ["second"] * 3 + ["rest"] * 4


def test_without_stages_the_option_holds_throughout():
    config = load_config(RUN)
    assert {temperature_schedule(config)(step) for step in range(1, 11)} == {1.0}
    assert {group_size_schedule(config)(step) for step in range(1, 11)} == {8}


def test_stages_are_read_from_the_options():
    config = load_config(
        [
            *RUN,
            "rollout.temperature_schedule=[{until:0.2,value:1.2},{until:1.0,value:1.1}]",
            "rollout.n_schedule=[{until:0.1,value:32}]",
        ]
    )
    assert [temperature_schedule(config)(step) for step in (1, 2, 3, 10)] == [1.2, 1.2, 1.1, 1.1]
    assert [group_size_schedule(config)(step) for step in (1, 2, 10)] == [32, 8, 8]
