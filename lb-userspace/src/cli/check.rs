//! `check`: reads a configuration as `run` would, and says what is wrong with it.

use std::{fmt::Display, path::Path};

use serde::Serialize;

use super::{Ended, args::Format, read};
use crate::{
    config::{self, Diagnostic, LoadError, Severity},
    daemon::{certificate_warnings, load_certificates},
    dataplane::address_conflicts,
    failure::{Exit, Failure},
    model::{Generation, Mode},
};

/// What `check --json` prints.
#[derive(Debug, Serialize)]
struct Report {
    file: String,
    /// May `run` use it?
    valid: bool,
    /// Why there is nothing to diagnose: the file cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    diagnostics: Vec<Diagnostic>,
    /// What is wrong with certificates and keys that it names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    certificate_faults: Vec<String>,
    /// What is hardly meant about them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    certificate_warnings: Vec<String>,
    /// What addresses of this box forbid, when it has the interfaces that it names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    address_faults: Vec<String>,
    /// What is in it, when its text is valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    summary: Option<Summary>,
    #[serde(skip)]
    code: Exit,
}

#[derive(Debug, Serialize)]
struct Summary {
    mode: &'static str,
    virtual_servers: usize,
    pools: usize,
    members: usize,
    monitors: usize,
    certificates: usize,
}

/// `check FILE`.
pub(super) fn check(file: &Path, format: Format) -> Result<Ended, Failure> {
    let report = Report::of(file);
    let code = report.code.code();
    if format.json {
        let out = read::json(&report)?;
        return Ok(Ended {
            code,
            out,
            ..Ended::default()
        });
    }
    let (out, err) = report.text();
    Ok(Ended { code, out, err })
}

impl Report {
    fn of(file: &Path) -> Self {
        let name = file.display().to_string();
        match config::load(file) {
            Ok((generation, diagnostics)) => {
                let (loaded, faults) = load_certificates(&generation);
                let address_faults = address_conflicts(&generation).unwrap_or_else(|error| {
                    vec![format!(
                        "the addresses of this box are not known: {error:#}\n  \
                         Nobody can tell whether they forbid this file.\n  Look where netlink is allowed."
                    )]
                });
                let valid = faults.is_empty() && address_faults.is_empty();
                Self {
                    file: name,
                    valid,
                    error: None,
                    diagnostics,
                    certificate_faults: faults.iter().map(ToString::to_string).collect(),
                    certificate_warnings: certificate_warnings(&loaded),
                    address_faults,
                    summary: Some(Summary::of(&generation)),
                    code: if valid { Exit::Ok } else { Exit::Config },
                }
            }
            Err(LoadError::Invalid(diagnostics)) => Self {
                file: name,
                valid: false,
                error: None,
                diagnostics,
                certificate_faults: Vec::new(),
                certificate_warnings: Vec::new(),
                address_faults: Vec::new(),
                summary: None,
                code: Exit::Config,
            },
            Err(error) => {
                let said = error.to_string();
                Self {
                    file: name,
                    valid: false,
                    error: Some(said),
                    diagnostics: Vec::new(),
                    certificate_faults: Vec::new(),
                    certificate_warnings: Vec::new(),
                    address_faults: Vec::new(),
                    summary: None,
                    code: Failure::from(error).code,
                }
            }
        }
    }

    /// What is said on standard output, and on standard error.
    fn text(&self) -> (String, String) {
        let mut err = String::new();
        let findings = self.diagnostics.iter().map(|found| found as &dyn Display);
        let faults = self
            .certificate_warnings
            .iter()
            .chain(&self.certificate_faults)
            .chain(&self.address_faults)
            .chain(&self.error);
        for finding in findings.chain(faults.map(|found| found as &dyn Display)) {
            err.push_str(&format!("{finding}\n\n"));
        }
        if let Some(summary) = self.summary.as_ref().filter(|_| self.valid) {
            let warnings = match self.diagnostics.len() + self.certificate_warnings.len() {
                0 => String::new(),
                1 => ", 1 warning".to_owned(),
                count => format!(", {count} warnings"),
            };
            return (
                format!("{}: valid{warnings}: {}\n", self.file, summary.text()),
                err,
            );
        }
        if self.error.is_none() {
            let errors = self
                .diagnostics
                .iter()
                .filter(|found| found.severity == Severity::Error)
                .count()
                + self.certificate_faults.len()
                + self.address_faults.len();
            let errors = counted(errors, "fault", "faults");
            err.push_str(&format!("{}: invalid: {errors}\n", self.file));
        }
        (String::new(), err)
    }
}

impl Summary {
    fn of(generation: &Generation) -> Self {
        Self {
            mode: match generation.mode {
                Mode::PassthroughOnly => "passthrough-only",
                Mode::Mixed => "mixed",
            },
            virtual_servers: generation.virtual_servers.len(),
            pools: generation.pools.len(),
            members: generation
                .pools
                .values()
                .map(|pool| pool.members.len())
                .sum(),
            monitors: generation.monitors.len(),
            certificates: generation.certificates.len(),
        }
    }

    fn text(&self) -> String {
        [
            format!("mode {}", self.mode),
            counted(self.virtual_servers, "virtual server", "virtual servers"),
            counted(self.pools, "pool", "pools"),
            counted(self.members, "member", "members"),
            counted(self.monitors, "monitor", "monitors"),
            counted(self.certificates, "certificate", "certificates"),
        ]
        .join(", ")
    }
}

fn counted(count: usize, one: &str, more: &str) -> String {
    let noun = if count == 1 { one } else { more };
    format!("{count} {noun}")
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    const TEXT: Format = Format { json: false };
    const JSON: Format = Format { json: true };

    const VALID: &str = r#"
[network]
client_interfaces = ["lo"]
server_interfaces = ["lo"]

[virtual_server.smtps]
address = "203.0.113.10"
port = 465
forward = "passthrough"
pool = "mx-tls"
snat = "automap"
proxy_protocol = "none"

[pool.mx-tls]
monitor = "tcp"
[[pool.mx-tls.member]]
name = "mx1"
address = "10.0.0.11"
port = 465

[monitor.tcp]
type = "tcp"
"#;

    fn written(text: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("smtplb.toml");
        fs::write(&file, text).unwrap();
        (dir, file)
    }

    fn json(file: &Path) -> (u8, serde_json::Value) {
        let ended = check(file, JSON).unwrap();
        assert_eq!(ended.err, "");
        (ended.code, serde_json::from_str(&ended.out).unwrap())
    }

    #[test]
    fn a_valid_file_is_0_and_summed_up() {
        let (_dir, file) = written(VALID);
        let ended = check(&file, TEXT).unwrap();
        assert_eq!((ended.code, ended.err.as_str()), (0, ""));
        assert_eq!(
            ended.out,
            format!(
                "{}: valid: mode mixed, 1 virtual server, 1 pool, 1 member, 1 monitor, 0 certificates\n",
                file.display()
            )
        );
        let (code, report) = json(&file);
        assert_eq!(code, 0);
        assert_eq!(report["valid"], true);
        assert_eq!(report["summary"]["members"], 1);
        assert_eq!(report["diagnostics"], serde_json::json!([]));
    }

    #[test]
    fn warnings_do_not_make_it_invalid() {
        let (_dir, file) = written(VALID.replace("monitor = \"tcp\"", ""));
        let ended = check(&file, TEXT).unwrap();
        assert_eq!(ended.code, 0);
        assert!(ended.out.contains(": valid, 2 warnings: "), "{}", ended.out);
        assert!(ended.err.contains("has no monitor"), "{}", ended.err);
    }

    #[test]
    fn an_invalid_file_is_78_with_every_fault() {
        let text = VALID.replace("465", "\"imaps\"").replace("automap", "auto");
        let (_dir, file) = written(text);
        let ended = check(&file, TEXT).unwrap();
        assert_eq!((ended.code, ended.out.as_str()), (78, ""));
        assert!(ended.err.contains("smtplb.toml:8:"), "{}", ended.err);
        assert!(ended.err.contains("smtplb.toml:11:"), "{}", ended.err);
        assert!(
            ended.err.ends_with(": invalid: 3 faults\n"),
            "{}",
            ended.err
        );
        let (code, report) = json(&file);
        assert_eq!(code, 78);
        assert_eq!(report["valid"], false);
        assert_eq!(report["diagnostics"].as_array().unwrap().len(), 3);
        assert_eq!(report["diagnostics"][0]["line"], 8);
        assert!(report.get("summary").is_none());
    }

    #[test]
    fn a_certificate_that_cannot_be_used_is_78() {
        let proxy = r#"
[virtual_server.submission]
address = "203.0.113.10"
port = 587
forward = "proxy"
client_tls = "starttls"
certificates = ["mail"]
pool = "mx-tls"

[certificate.mail]
chain = "mail.pem"
key = "mail.key"
"#;
        let (dir, file) = written(format!("{VALID}{proxy}"));
        let ended = check(&file, TEXT).unwrap();
        assert_eq!((ended.code, ended.out.as_str()), (78, ""));
        let missing = dir.path().join("mail.pem").display().to_string();
        assert!(ended.err.contains(&missing), "{}", ended.err);
        assert!(ended.err.contains("certificate \"mail\""), "{}", ended.err);
        assert_eq!(
            json(&file).1["certificate_faults"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
        let (_dir, file) = written(VALID.replace(
            "[network]",
            "[certificate.mail]\nchain = \"a\"\nkey = \"b\"\n[network]",
        ));
        assert_eq!(
            check(&file, TEXT).unwrap().code,
            0,
            "what nobody uses is not read"
        );
    }

    #[test]
    fn an_address_of_this_box_in_a_snat_pool_is_78() {
        let pool = "[snat.own]\naddresses = [\"127.0.0.1\"]\n[network]";
        let text = VALID.replace("automap", "own").replace("[network]", pool);
        let (_dir, file) = written(&text);
        let ended = check(&file, TEXT).unwrap();
        assert_eq!((ended.code, ended.out.as_str()), (78, ""));
        let said = "SNAT pool \"own\" has 127.0.0.1, which is an address of the box itself";
        assert!(ended.err.contains(said), "{}", ended.err);
        assert!(ended.err.ends_with(": invalid: 1 fault\n"), "{}", ended.err);
        let faults = json(&file).1["address_faults"].clone();
        assert_eq!(faults.as_array().unwrap().len(), 1);
        let (_dir, file) = written(text.replace("\"lo\"", "\"elsewhere0\""));
        assert_eq!(check(&file, TEXT).unwrap().code, 0, "of another box");
    }

    #[test]
    fn an_unreadable_file_is_78_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let (_other, binary) = written([0xff, 0xfe, 0x00]);
        for file in [dir.path().join("none.toml"), dir.path().to_owned(), binary] {
            let ended = check(&file, TEXT).unwrap();
            assert_eq!((ended.code, ended.out.as_str()), (78, ""));
            assert!(ended.err.contains(file.to_str().unwrap()), "{}", ended.err);
            let (code, report) = json(&file);
            assert_eq!(code, 78);
            assert_eq!(report["valid"], false);
            assert!(report["error"].is_string());
        }
    }
}
