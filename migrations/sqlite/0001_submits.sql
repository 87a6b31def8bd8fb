-- One row per submit, and per submit that a cancel struck out before it came. Times are milliseconds since 1970.
CREATE TABLE submits (
    command_id   TEXT PRIMARY KEY,
    -- Tells two bodies apart; null while there is only a strike.
    fingerprint  BLOB,
    -- Who has it in hand: the claim, and the worker that made it.
    token        BLOB,
    worker       BLOB,
    lease_until  INTEGER,
    -- From when on a request may have left.
    sent_from    INTEGER,
    attempts     INTEGER,
    -- Until when it must not be begun.
    struck_until INTEGER,
    -- How it ended, as JSON.
    settled_at   INTEGER,
    ending       TEXT
) STRICT;

-- For the removal of what is old.
CREATE INDEX submits_settled_at ON submits (settled_at) WHERE settled_at IS NOT NULL;
CREATE INDEX submits_only_struck ON submits (struck_until) WHERE fingerprint IS NULL;

-- One row: who this file's worker is, across restarts.
CREATE TABLE owner (worker BLOB NOT NULL) STRICT;
