//! The command line from its words to its exit code, against a daemon that always says the same.

use std::path::Path;

use anyhow::anyhow;

use super::*;
use crate::admin::sample::{GOLDEN, with_server};

/// How `smtplb WORDS` ends.
fn smtplb(words: &[&str]) -> Ended {
    let words = std::iter::once("smtplb").chain(words.iter().copied());
    let mut long = Vec::new();
    let ended = end(
        words.map(OsString::from),
        |_| panic!("the daemon was started"),
        &mut long,
    );
    let out = String::from_utf8(long).unwrap() + &ended.out;
    Ended { out, ..ended }
}

/// How a reading verb ends that asks the daemon on `socket`.
fn ask(socket: &Path, words: &[&str]) -> Ended {
    smtplb(&[&["--admin", socket.to_str().unwrap()], words].concat())
}

/// Compares with a golden file, or rewrites it when `SMTPLB_BLESS` is set.
fn assert_golden(name: &str, golden: &str, out: &str) {
    if std::env::var_os("SMTPLB_BLESS").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name);
        std::fs::write(path, out).unwrap();
        return;
    }
    assert_eq!(out, golden, "{name}; SMTPLB_BLESS=1 rewrites it");
}

#[test]
fn clap_finds_no_contradiction() {
    Cli::command().debug_assert();
}

#[test]
fn json_is_the_pinned_contract() {
    let verbs: [&[&str]; 9] = [
        &["status"],
        &["show", "virtual-servers"],
        &["show", "pools"],
        &["show", "members"],
        &["show", "flows"],
        &["show", "sessions"],
        &["stats"],
        &["show", "policy"],
        &["show", "certificates"],
    ];
    with_server(|socket| {
        for ((route, golden), words) in GOLDEN.into_iter().zip(verbs) {
            let ended = ask(socket, &[words, &["--json"]].concat());
            assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{words:?}");
            let name = format!(
                "admin/golden/{}.json",
                route.path().trim_start_matches("/v1/")
            );
            assert_golden(&name, golden, &ended.out);
        }
    });
}

#[test]
fn text_is_as_people_know_it() {
    let verbs: [(&[&str], &str, &str); 9] = [
        (&["status"], "status", include_str!("golden/status.txt")),
        (
            &["show", "virtual-servers"],
            "virtual-servers",
            include_str!("golden/virtual-servers.txt"),
        ),
        (
            &["show", "pools"],
            "pools",
            include_str!("golden/pools.txt"),
        ),
        (
            &["show", "members"],
            "members",
            include_str!("golden/members.txt"),
        ),
        (
            &["show", "flows"],
            "flows",
            include_str!("golden/flows.txt"),
        ),
        (
            &["show", "sessions"],
            "sessions",
            include_str!("golden/sessions.txt"),
        ),
        (
            &["show", "certificates"],
            "certificates",
            include_str!("golden/certificates.txt"),
        ),
        (&["stats"], "stats", include_str!("golden/stats.txt")),
        (
            &["show", "members", "msa/msa2"],
            "member",
            include_str!("golden/member.txt"),
        ),
    ];
    with_server(|socket| {
        for (words, name, golden) in verbs {
            let ended = ask(socket, words);
            assert_eq!((ended.code, ended.err.as_str()), (0, ""), "{words:?}");
            assert_golden(&format!("cli/golden/{name}.txt"), golden, &ended.out);
        }
    });
}

#[test]
fn names_narrow_what_is_shown() {
    let count = |ended: Ended| {
        let list: Vec<serde_json::Value> = serde_json::from_str(&ended.out).unwrap();
        list.len()
    };
    with_server(|socket| {
        let show = |kind, name| ask(socket, &["show", kind, name, "--json"]);
        assert_eq!(count(show("virtual-servers", "smtps")), 1);
        assert_eq!(count(show("pools", "msa")), 1);
        assert_eq!(count(show("members", "msa")), 2);
        assert_eq!(count(show("members", "msa/msa2")), 1);
        assert_eq!(count(show("members", "mx-tls/10.0.0.21:465")), 1);
        assert_eq!(count(show("flows", "smtps")), 1);
        assert_eq!(count(show("flows", "submission6")), 0);
        assert_eq!(count(show("sessions", "submission6")), 2);
        for kind in ["virtual-servers", "pools", "members", "flows", "sessions"] {
            let ended = show(kind, "nix");
            assert_eq!(ended.code, 1, "{kind}");
            assert!(
                ended.err.contains("named \"nix\"\n  The daemon knows: "),
                "{}",
                ended.err
            );
        }
    });
}

#[test]
fn an_absent_daemon_is_69_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("admin.sock");
    for words in [
        ["status"].as_slice(),
        &["stats", "--json"],
        &["show", "flows"],
    ] {
        let ended = ask(&socket, words);
        assert_eq!((ended.code, ended.out.as_str()), (69, ""));
        assert!(
            ended.err.starts_with("smtplb: no daemon answers on "),
            "{}",
            ended.err
        );
        assert!(ended.err.ends_with("with `--admin`.\n"), "{}", ended.err);
    }
}

#[test]
fn health_ends_by_the_plugin_convention() {
    with_server(|socket| {
        let ended = ask(socket, &["health"]);
        assert_eq!(ended.code, 1);
        assert!(ended.out.starts_with("SMTPLB WARNING: "), "{}", ended.out);
        let ended = ask(socket, &["health", "--json"]);
        assert_eq!(ended.code, 1);
        let health: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
        assert_eq!(health["state"], "WARNING");
        assert_eq!(health["perfdata"]["members_up"]["max"], 3);
    });
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(ask(&dir.path().join("admin.sock"), &["health"]).code, 3);
}

#[test]
fn mistakes_on_the_command_line_are_2() {
    let mistakes: [&[&str]; 9] = [
        &[],
        &["nix"],
        &["drain", "msa1"],
        &["drain", "msa/msa1", "--deadline", "60"],
        &["show", "members", "--count"],
        &["show"],
        &["show", "nodes"],
        &["status", "--yaml"],
        &["man", "nix"],
    ];
    for words in mistakes {
        assert_eq!(smtplb(words).code, 2, "{words:?}");
    }
    assert_eq!(smtplb(&["--version"]).code, 0);
    assert_eq!(smtplb(&["show", "--help"]).code, 0);
}

#[test]
fn options_of_every_verb_stand_before_or_after_it() {
    let expected = Paths {
        config: "/c".into(),
        admin: "/run/smtplb/admin.sock".into(),
        bpffs: "/run/smtplb/bpf".into(),
        state: "/s".into(),
    };
    for words in [
        ["smtplb", "--config", "/c", "run", "--state", "/s"],
        ["smtplb", "--config", "/c", "--state", "/s", "run"],
        ["smtplb", "run", "--config", "/c", "--state", "/s"],
    ] {
        let paths = Cli::try_parse_from(words).unwrap().paths;
        assert_eq!(format!("{paths:?}"), format!("{expected:?}"));
    }
}

#[test]
fn run_gets_its_options_and_gives_its_code() {
    let words = ["smtplb", "run", "--kernel-log", "--config", "/c"].map(OsString::from);
    let run: Run = |options| {
        assert!(options.kernel_log);
        assert_eq!(options.config, Path::new("/c"));
        assert_eq!(options.state, Path::new("/var/lib/smtplb"));
        Err(Failure::new(Exit::Privilege, anyhow!("CAP_BPF is missing")))
    };
    let ended = end(words, run, &mut io::sink());
    assert_eq!(ended.code, 77);
    assert_eq!(ended.err, "smtplb: CAP_BPF is missing\n");
    let ended = end(
        ["smtplb", "run"].map(OsString::from),
        |_| Ok(()),
        &mut io::sink(),
    );
    assert_eq!(ended, Ended::default());
}

#[test]
fn completions_and_manual_pages_name_every_verb() {
    let verbs: Vec<_> = Cli::command()
        .get_subcommands()
        .map(|verb| verb.get_name().to_owned())
        .collect();
    let bash = smtplb(&["completions", "bash"]);
    let man = smtplb(&["man"]);
    assert_eq!((bash.code, man.code), (0, 0));
    assert!(man.out.contains(".TH smtplb 8"), "{}", man.out);
    assert!(man.out.contains("69  no daemon answers"), "{}", man.out);
    for verb in &verbs {
        assert!(bash.out.contains(verb), "{verb}");
        assert!(
            man.out.contains(&format!("smtplb\\-{verb}(8)")),
            "{verb}: {}",
            man.out
        );
        let page = smtplb(&["man", verb]);
        assert_eq!(page.code, 0);
        assert!(
            page.out.contains(&format!("smtplb\\-{verb}")),
            "{}",
            page.out
        );
        assert!(page.out.contains("\\-\\-admin"), "{}", page.out);
    }
}

#[test]
fn a_connection_is_explained() {
    with_server(|socket| {
        let question = [
            "explain",
            "--from",
            "2001:db8::7",
            "--to",
            "[2001:db8::10]:25",
            "--vlan",
            "10",
        ];
        let ended = ask(socket, &[&question[..], &["--interface", "eth0"]].concat());
        assert_eq!(ended.code, 0, "{}", ended.err);
        assert!(
            ended.out.starts_with(
                "[2001:db8::7]:49152 -> [2001:db8::10]:25 by eth0, vlan 10: refused, policy-drop\n"
            ),
            "{}",
            ended.out
        );
        let ended = ask(socket, &question);
        assert_eq!(
            (ended.code, ended.err.as_str()),
            (1, "smtplb: there is no such interface\n")
        );
    });
    assert_eq!(
        smtplb(&["explain", "--from", "nobody", "--to", "192.0.2.1:25"]).code,
        2
    );
}

#[test]
fn help_tells_the_exit_codes() {
    let help = Cli::command().render_long_help().to_string();
    for code in [0, 1, 2, 69, 75, 77, 78] {
        assert!(help.contains(&format!("{code:>4}  ")), "{code}: {help}");
    }
}
