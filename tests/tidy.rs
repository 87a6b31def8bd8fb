//! The rules of the layout, as `ARCHITECTURE.md` states them, read off the source.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails loudly")]

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Every Rust file below a folder, with its text.
fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(ROOT).join(folder), &mut found);
    let named = found.into_iter().map(|path| {
        let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(path).unwrap())
    });
    named.collect()
}

/// A file of `src/` without its comments and without the unit tests at its foot.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]").next().unwrap();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn each_adapter_is_the_one_place_of_its_library() {
    for (library, home) in [
        ("lapin::", "src/broker/"),
        ("reqwest::", "src/elevenlabs/"),
        ("backoff::", "src/retry.rs"),
        ("std::env::", "src/config.rs"),
        ("jsonschema::", "src/domain/"),
        ("rusqlite::", "src/ledger/"),
        ("tokio_postgres::", "src/ledger/"),
        ("axum::", "src/health.rs"),
        ("clap::", "src/cli.rs"),
    ] {
        let mut lives = false;
        for (name, text) in sources("src") {
            let uses = code(&text).contains(library);
            let allowed = name.starts_with(home)
                || (library == "axum::" && name == "src/app.rs")
                // A test's switch, which no build for people has.
                || (library == "std::env::" && name == "src/crash.rs")
                || (library == "clap::" && name == "src/main.rs");
            assert!(!uses || allowed, "{name} uses {library}, whose place is {home}");
            lives |= uses && allowed;
        }
        assert!(lives, "nothing uses {library} any more: the rule is stale");
    }
    for (name, text) in sources("src") {
        let allowed = ["src/main.rs", "src/app.rs", "src/cli.rs"].contains(&name.as_str());
        assert!(allowed || !code(&text).contains("anyhow"), "{name} uses anyhow");
    }
}

#[test]
fn modules_import_only_what_is_below_them() {
    let allowed: &[(&str, &[&str])] = &[
        ("domain", &[]),
        ("telemetry", &[]),
        ("retry", &[]),
        ("health", &["domain"]),
        ("crash", &[]),
        ("config", &["telemetry"]),
        ("ledger", &["domain", "telemetry"]),
        ("elevenlabs", &["domain"]),
        ("broker", &["crash", "domain", "telemetry"]),
        ("handler", &["crash", "domain", "elevenlabs", "ledger", "retry", "telemetry"]),
        ("worker", &["broker", "crash", "domain", "handler", "health", "retry", "telemetry"]),
        (
            "app",
            &[
                "broker",
                "config",
                "elevenlabs",
                "handler",
                "health",
                "ledger",
                "retry",
                "telemetry",
                "worker",
            ],
        ),
        ("cli", &["app", "broker", "config", "domain", "telemetry"]),
    ];
    let modules: Vec<_> = allowed.iter().map(|(module, _)| *module).collect();
    for (name, text) in sources("src") {
        let module = name.trim_start_matches("src/").split(['/', '.']).next().unwrap();
        if ["main", "lib"].contains(&module) {
            continue;
        }
        let (_, may) = allowed.iter().find(|(other, _)| *other == module).unwrap_or_else(|| {
            panic!("{name}: give the module {module} its place in this test and in ARCHITECTURE.md")
        });
        let code = code(&text);
        for other in &modules {
            let imports = code.contains(&format!("crate::{other}"))
                || code.contains(&format!("use crate::{{{other}"))
                || (code.contains("use crate::{") && code.contains(&format!(" {other}}}")));
            assert!(
                !imports || *other == module || may.contains(other),
                "{name} imports {other}, and {module} may import {may:?} only"
            );
        }
    }
}

#[test]
fn files_fit_in_the_head_and_say_their_job_first() {
    for folder in ["src", "sandbox/src", "soak/src", "tests", "sandbox/tests", "benches"] {
        if !Path::new(ROOT).join(folder).exists() {
            continue;
        }
        for (name, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(lines <= 500, "{name} has {lines} lines");
            assert!(text.starts_with("//! "), "{name} does not open with its job");
        }
    }
}

#[test]
fn no_test_is_ignored_and_no_task_is_forgotten() {
    let ignored = concat!("#[", "ignore");
    let later = concat!("TO", "DO");
    for folder in ["src", "sandbox/src", "soak/src", "tests", "sandbox/tests"] {
        for (name, text) in sources(folder) {
            assert!(!text.contains(ignored), "{name} ignores a test");
            assert!(!text.contains(later), "{name} has a task nobody tracks");
        }
    }
}
