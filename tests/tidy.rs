//! The rules of the layout, as `ARCHITECTURE.md` states them, read off the source.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails loudly")]

use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::Visit;

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

/// Every path that a file of `src/` names outside its unit tests: `["crate", "broker", "open"]`. Of what
/// stands in a macro, two names at a time.
#[derive(Default)]
struct Paths(Vec<Vec<String>>);

impl Paths {
    fn of(text: &str) -> Self {
        let mut paths = Self::default();
        paths.visit_file(&syn::parse_file(text).unwrap());
        paths
    }

    /// Whether one of them begins so.
    fn has(&self, begin: &[&str]) -> bool {
        self.0
            .iter()
            .any(|path| path.len() >= begin.len() && path.iter().zip(begin).all(|(a, b)| a == b))
    }

    fn add_use(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_use(&path.tree, &with(&path.ident)),
            syn::UseTree::Name(name) => self.0.push(with(&name.ident)),
            syn::UseTree::Rename(name) => self.0.push(with(&name.ident)),
            syn::UseTree::Glob(_) => self.0.push(before.to_vec()),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_use(tree, before));
            }
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|what| what.is_ident("test"))
    })
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_use(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let text = call.tokens.to_string();
        for (at, _) in text.match_indices("::") {
            let before = text[..at].trim_end().rsplit(|c: char| !c.is_alphanumeric() && c != '_');
            let after =
                text[at + 2..].trim_start().split(|c: char| !c.is_alphanumeric() && c != '_');
            let names = before.take(1).chain(after.take(1));
            self.0.push(names.map(str::to_owned).collect());
        }
        syn::visit::visit_macro(self, call);
    }
}

/// The files of `src/` that are no unit tests.
fn modules() -> Vec<(String, Paths)> {
    let files = sources("src").into_iter().filter(|(name, _)| {
        !name.ends_with("_tests.rs") && !name.starts_with("src/handler/model/")
    });
    files.map(|(name, text)| (name, Paths::of(&text))).collect()
}

#[test]
fn each_adapter_is_the_one_place_of_its_library() {
    let modules = modules();
    for (library, home) in [
        ("lapin", "src/broker/"),
        ("reqwest", "src/elevenlabs/"),
        ("backoff", "src/retry.rs"),
        ("jsonschema", "src/domain/"),
        ("rusqlite", "src/ledger/"),
        ("tokio_postgres", "src/ledger/"),
        ("axum", "src/health.rs"),
        ("clap", "src/cli.rs"),
        ("anyhow", "src/app.rs"),
    ] {
        let mut lives = false;
        for (name, paths) in &modules {
            let uses = paths.has(&[library]);
            let allowed = name.starts_with(home)
                || (library == "axum" && name == "src/app.rs")
                || (library == "anyhow" && ["src/main.rs", "src/cli.rs"].contains(&name.as_str()))
                || (library == "clap" && name == "src/main.rs");
            assert!(!uses || allowed, "{name} uses {library}, whose place is {home}");
            lives |= uses && allowed;
        }
        assert!(lives, "nothing uses {library} any more: the rule is stale");
    }
    for (name, paths) in &modules {
        // `crash.rs` is a test's switch, which no build for people has.
        let allowed = ["src/config.rs", "src/crash.rs"].contains(&name.as_str());
        let uses = paths.has(&["std", "env"]) || paths.has(&["env", "var"]);
        assert!(allowed || !uses, "{name} reads the environment, whose place is src/config.rs");
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
    for (name, paths) in modules() {
        let module = name.trim_start_matches("src/").split(['/', '.']).next().unwrap();
        if ["main", "lib"].contains(&module) {
            continue;
        }
        let (_, may) = allowed.iter().find(|(other, _)| *other == module).unwrap_or_else(|| {
            panic!("{name}: give the module {module} its place in this test and in ARCHITECTURE.md")
        });
        for (other, _) in allowed {
            assert!(
                !paths.has(&["crate", other]) || *other == module || may.contains(other),
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

/// Whether an attribute keeps a test from running.
struct Ignores(bool);

impl<'ast> Visit<'ast> for Ignores {
    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        let ignore = |path: &syn::Path| path.is_ident("ignore");
        let told = || attribute.meta.require_list().map(|list| list.tokens.to_string());
        let is_hidden = attribute.path().is_ident("cfg_attr")
            && told().is_ok_and(|told| told.split([',', ' ']).any(|word| word == "ignore"));
        self.0 |= ignore(attribute.path()) || is_hidden;
    }
}

#[test]
fn no_test_is_ignored_and_no_task_is_forgotten() {
    let later = concat!("TO", "DO");
    for folder in ["src", "sandbox/src", "soak/src", "tests", "sandbox/tests"] {
        for (name, text) in sources(folder) {
            let mut ignores = Ignores(false);
            ignores.visit_file(&syn::parse_file(&text).unwrap());
            assert!(!ignores.0, "{name} ignores a test");
            assert!(!text.contains(later), "{name} has a task nobody tracks");
        }
    }
}
