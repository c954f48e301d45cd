from analysis.common.command import command


def test_places_of_this_machine_are_left_out():
    arguments = ["--parts", "a", "--data-dir", "/somewhere", "--output=/there", "--seed", "1", "--name", "two words"]
    assert command("check", arguments) == 'python -m analysis.check --parts a --seed 1 --name "two words"'
