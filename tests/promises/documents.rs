//! The documents say what the code does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use call_manager::domain::result::ErrorCode;

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Each setting with its default, from the embedded file.
fn defaults() -> BTreeMap<String, String> {
    let file = read("src/config.default.toml");
    let lines = file.lines().filter(|line| !line.starts_with('#') && line.contains(" = "));
    let pairs = lines.map(|line| line.split_once(" = ").unwrap());
    pairs.map(|(name, value)| (name.to_uppercase(), value.trim_matches('"').to_owned())).collect()
}

/// The cells of a Markdown table's rows.
fn rows(document: &str) -> Vec<Vec<String>> {
    let lines = document.lines().filter(|line| line.starts_with('|'));
    let cells = |line: &str| {
        line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    lines.map(cells).collect()
}

#[test]
fn the_readmes_settings_are_those_there_are_with_their_defaults() {
    let mut documented = BTreeMap::new();
    for row in rows(&read("README.md")) {
        let names: Vec<_> = row[0].split(", ").collect();
        if row.len() == 3 && names.iter().all(|name| defaults().contains_key(*name)) {
            for (n, name) in names.iter().enumerate() {
                let value = row[1].split(", ").nth(n).unwrap_or_default();
                documented.insert((*name).to_owned(), value.to_owned());
            }
        }
    }
    assert_eq!(documented, defaults());
}

#[test]
fn the_example_environment_file_has_every_setting_with_its_default() {
    let example = read(".env.example");
    for (name, value) in defaults() {
        let line = example
            .lines()
            .find_map(|line| line.trim_start_matches("# ").strip_prefix(&format!("{name}=")))
            .unwrap_or_else(|| panic!("{name} is missing in .env.example"));
        assert_eq!(line, value, "{name}");
    }
}

#[test]
fn the_readme_lists_every_error_code_with_its_status_code() {
    let rows = rows(&read("README.md"));
    for code in ErrorCode::ALL {
        let row = rows.iter().find(|row| row[0] == code.name());
        let row = row.unwrap_or_else(|| panic!("{code} is missing in the README"));
        assert_eq!(row[1], code.status_code().to_string(), "{code}");
    }
}

#[test]
fn the_readme_shows_the_files_it_speaks_of_as_they_are() {
    let readme = read("README.md");
    for file in ["script/demo-submit.json", "examples/submit.mjs", "examples/submit.py"] {
        assert!(readme.contains(read(file).trim()), "{file} is not in the README as it is");
    }
}

#[test]
fn every_file_that_a_document_names_is_there() {
    for document in ["README.md", "ARCHITECTURE.md", "docs/fault-matrix.md"] {
        let text = read(document);
        let folders =
            ["script/", "src/", "tests/", "schemas/", "sandbox/", "examples/", "benches/", "docs/"];
        let mut named = 0;
        for word in text.split(|c: char| c.is_whitespace() || "`(),;|".contains(c)) {
            if folders.iter().any(|folder| word.starts_with(folder)) {
                named += 1;
                let path =
                    Path::new(env!("CARGO_MANIFEST_DIR")).join(word.trim_end_matches(['.', ':']));
                assert!(path.exists(), "{document} names {word}");
            }
        }
        assert!(named > 3, "{document} names {named} files");
    }
}

fn is_source(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "rs")
}

/// The paths of all Rust files of the project.
fn sources() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = ["src", "tests", "sandbox", "soak", "benches"].map(|f| root.join(f)).to_vec();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("node_modules") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found
}

#[test]
fn every_source_file_that_a_document_names_is_there() {
    let sources = sources();
    for (document, least) in
        [("README.md", 6), ("ARCHITECTURE.md", 60), ("docs/fault-matrix.md", 25)]
    {
        let text = read(document);
        let words = text.split('`').skip(1).step_by(2);
        let named: Vec<_> = words.filter(|word| is_source(word)).collect();
        assert!(named.len() > least, "{document} names {}", named.len());
        for name in named {
            let end = format!("/{name}");
            let is_there = sources.iter().any(|path| path == name || path.ends_with(&end));
            assert!(is_there, "{document} names {name}");
        }
    }
}

#[test]
fn every_row_of_the_fault_matrix_that_names_a_test_names_one_with_tests_in_it() {
    let named = rows(&read("docs/fault-matrix.md"));
    let tests = named.iter().flatten().flat_map(|cell| cell.split(", "));
    let tests: Vec<_> = tests.filter(|word| is_source(word)).collect();
    assert!(tests.len() > 50, "{} rows name a test", tests.len());
    for name in tests {
        let text = read(&format!("tests/promises/{name}"));
        assert!(text.contains("#[tokio::test]") || text.contains("#[test]"), "{name} has no test");
    }
}
