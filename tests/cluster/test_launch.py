"""What init()'s arguments and the environment mean, and the command line."""

import subprocess
import sys

import pytest

from meshtape.cluster import cli, doctor, launch
from meshtape.cluster.launch import make_mesh
from meshtape.runtime.errors import MeshError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in (launch.WORKERS, launch.ADDRESS, launch.BACKEND, launch.MESH):
        monkeypatch.delenv(name, raising=False)


def test_one_worker_in_this_process_unless_asked_for_more():
    with make_mesh() as mesh:
        assert (mesh.kind, mesh.shape, mesh.names) == ("inline", (1,), ("data",))
    with make_mesh(3, backend="local") as mesh:
        assert (mesh.kind, mesh.shape) == ("threads", (3,))
    with make_mesh(backend="local", mesh={"data": 2, "model": 2}) as mesh:
        assert (mesh.size, mesh.names) == (4, ("data", "model"))


def test_the_environment_stands_in_where_nothing_is_given(monkeypatch):
    monkeypatch.setenv(launch.WORKERS, "4")
    monkeypatch.setenv(launch.BACKEND, "local")
    monkeypatch.setenv(launch.MESH, "data=2, model=2")
    with make_mesh() as mesh:
        assert (mesh.kind, mesh.names, mesh.shape) == ("threads", ("data", "model"), (2, 2))
    with make_mesh(2, backend="local") as mesh:
        assert (mesh.names, mesh.shape) == (("data",), (2,))
    with make_mesh(mesh={"model": 4}) as mesh:
        assert (mesh.kind, mesh.names) == ("threads", ("model",))
    monkeypatch.setenv(launch.WORKERS, "many")
    with pytest.raises(MeshError, match="MESHTAPE_WORKERS='many'"):
        make_mesh()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"workers": 0, "backend": "local"}, "whole number of at least 1"),
    ({"workers": 2.0}, "whole number of at least 1"),
    ({"workers": 4, "backend": "local", "mesh": {"data": 3}}, "3 places"),
    ({"workers": 2, "backend": "mpi"}, "backend='mpi'"),
    ({"workers": 2, "backend": "local", "address": "auto"}, "threads of this process"),
    ({"workers": 2, "channel": "pigeon"}, "channel='pigeon'"),
    ({"workers": 2, "devices": "tpu"}, "devices='tpu'"),
    ({"workers": 4, "mesh": {"data": 3}}, "3 places"),
])
def test_a_wrong_argument_is_named_before_anything_starts(arguments, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(**arguments)


def test_no_ray_is_imported_for_a_mesh_in_this_process():
    text = ("import sys, meshtape.cluster.cli; from meshtape.cluster.launch import make_mesh\n"
            "make_mesh(2, backend='local'); make_mesh().close(); sys.exit('ray' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0


def test_run_passes_options_in_the_environment_and_the_rest_to_the_script(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(__name__, sys.argv[1:], os.environ.get('MESHTAPE_WORKERS'),\n"
                      "      os.environ.get('MESHTAPE_MESH'), os.environ.get('MESHTAPE_ADDRESS'))\n")
    command = [sys.executable, "-m", "meshtape", "run", str(script), "in.csv", "--workers", "4", "--mesh",
               "data=4", "--lr", "0.1", "--", "--workers", "9"]
    subprocess.run(command, check=True)
    assert capfd.readouterr().out.split("\n")[0] == (
        "__main__ ['in.csv', '--lr', '0.1', '--workers', '9'] 4 data=4 None")


def test_run_names_a_script_that_is_not_there(capsys):
    assert cli.main(["run", "nothing.py"]) == 2
    assert "nothing.py" in capsys.readouterr().err


def test_doctor_reports_and_says_how_to_fix(monkeypatch, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Python 3." in out and "numpy" in out and "Ray" in out
    monkeypatch.setattr(doctor, "ray_version", lambda: doctor.Finding("wrong", "no Ray", "pip install ray"))
    assert cli.main(["doctor"]) == 1
    assert "-> pip install ray" in capsys.readouterr().out
