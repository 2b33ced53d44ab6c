from verl_krpo.report import figure


def test_a_method_has_one_color_by_whatever_name():
    assert figure.color("GRPO") == figure.color("grpo_cpu_seed3") == figure.METHOD_COLORS["grpo"]
    assert figure.color("Dr.GRPO") == figure.METHOD_COLORS["drgrpo"]
    assert figure.color("krpo (published)") == figure.color("krpo_cpu_seed1") == figure.METHOD_COLORS["krpo"]
    assert figure.color("krpo_adaptive_cpu_seed1") == figure.METHOD_COLORS["krpo_adaptive"]
    assert figure.color("krpo leave_one_out") == figure.METHOD_COLORS["krpo_leave_one_out"]
    assert len(set(figure.METHOD_COLORS.values())) == len(figure.METHOD_COLORS)


def test_runs_of_one_method_and_unknown_names_are_told_apart():
    names = ["mine", "krpo_seed1", "krpo_seed2", "grpofork", "other"]
    chosen = figure.colors(names)
    assert chosen["krpo_seed1"] == figure.METHOD_COLORS["krpo"]
    assert list(sorted(chosen)) == sorted(names) and len(set(chosen.values())) == 5
    assert len(figure.colors([f"run {k}" for k in range(20)])) == 20


def test_saved_as_png(tmp_path):
    drawn, panels = figure.axes(1, 2, 6, 3)
    figure.band(panels[0, 0], [1, 2], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7], color=figure.color("krpo"), label="krpo")
    figure.whole_steps(panels[0, 0])
    figure.legend(drawn)
    for given in ("name.v1", "name.v1.png"):
        assert figure.save(drawn, tmp_path / "new" / given) == tmp_path / "new" / "name.v1.png"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["name.v1.png"]
    assert (tmp_path / "new/name.v1.png").read_bytes().startswith(b"\x89PNG")
