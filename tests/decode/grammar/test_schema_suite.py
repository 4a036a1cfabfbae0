"""The official test suite, where its folder is at hand (PERTOKEN_JSON_SCHEMA_SUITE); the runner's own rules always."""

import json
import os
from pathlib import Path

import pytest

from pertoken.bench import schema_suite

RATCHET = Path(__file__).with_name("schema_suite.json")
FOLDER = os.environ.get("PERTOKEN_JSON_SCHEMA_SUITE", "")


@pytest.mark.skipif(not FOLDER, reason="PERTOKEN_JSON_SCHEMA_SUITE names no checkout of JSON-Schema-Test-Suite")
def test_no_case_of_the_official_suite_is_worse_than_before():
    found = schema_suite.run(Path(FOLDER))
    assert len(found) > 1000
    assert schema_suite.worse(found, json.loads(RATCHET.read_text("utf-8"))) == []


def make_suite(folder, valid):
    for draft in schema_suite.DRAFTS:
        (folder / "tests" / draft).mkdir(parents=True)
    tests = [{"description": "one", "data": 1, "valid": True}, {"description": "text", "data": "a", "valid": valid}]
    groups = [
        {"description": "integers", "schema": {"type": "integer"}, "tests": tests},
        {"description": "other", "schema": {"strange": 1}, "tests": tests[:1]},
    ]
    (folder / "tests" / "draft7" / "type.json").write_text(json.dumps(groups))


def test_ratchet(tmp_path, capsys):
    make_suite(tmp_path / "good", valid=False)
    make_suite(tmp_path / "bad", valid=True)
    ratchet = tmp_path / "ratchet.json"
    assert schema_suite.main([str(tmp_path / "good"), "--ratchet", str(ratchet), "--update"]) == 0
    assert json.loads(ratchet.read_text()) == {"draft7/type.json: other: one": "refused: strange"}
    assert "3 cases: 2 right, 1 refused" in capsys.readouterr().out
    assert schema_suite.main([str(tmp_path / "good"), "--ratchet", str(ratchet)]) == 0
    assert schema_suite.main([str(tmp_path / "bad"), "--ratchet", str(ratchet)]) == 1
    assert "rejects valid, was right" in capsys.readouterr().err
    ratchet.write_text(json.dumps({"draft7/type.json: integers: text": "accepts invalid"}))
    assert schema_suite.main([str(tmp_path / "bad"), "--ratchet", str(ratchet)]) == 1  # the refused case is new
    assert schema_suite.main([str(tmp_path)]) == 2
