//! The commands of docs/tutorials, as they are written there, on the lab's addresses.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use tests::{
    certs::MAIL_NAME,
    daemon::{self, Daemon},
    lab::{Family, Lab, Plan},
    member::{Mta, Site},
};

/// What an example calls something, and what it is in the lab.
struct Places(Vec<(String, String)>);

impl Places {
    fn of(lab: &Lab, site: &Site) -> Self {
        let (client, server) = lab.interfaces();
        let path = |path: &Path| path.display().to_string();
        let pairs = [
            ("203.0.113.10", Family::V4.virtual_address().to_string()),
            ("192.0.2.11", lab.members[0].v4.to_string()),
            ("192.0.2.12", lab.members[1].v4.to_string()),
            ("\"eth0\"", format!("{client:?}")),
            ("\"eth1\"", format!("{server:?}")),
            ("/etc/smtplb/mail.pem", path(&site.certificate.chain)),
            ("/etc/smtplb/mail.key", path(&site.certificate.key)),
            ("/etc/smtplb/roots.pem", path(&site.ca)),
            ("mx.example.org", MAIL_NAME.to_owned()),
            ("bob@example.org", "inbox@lab.example".to_owned()),
            (" ca.pem", format!(" {}", path(&site.ca))),
        ];
        Self(pairs.map(|(from, to)| (from.to_owned(), to)).to_vec())
    }

    fn apply(&self, text: &str) -> String {
        let pairs = self.0.iter();
        pairs.fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
    }
}

/// A command of a tutorial, and what it has to say, in this order.
#[derive(Debug)]
struct Step {
    command: String,
    says: Vec<String>,
}

fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.strip_prefix("$ ") {
            _ if line.starts_with("```") => inside = line == "```console",
            Some(command) if inside => steps.push(Step {
                command: command.to_owned(),
                says: Vec::new(),
            }),
            None if inside => {
                if let Some(step) = steps.last_mut() {
                    step.says.push(line.to_owned());
                }
            }
            _ => {}
        }
    }
    steps
}

impl Step {
    /// A refusal is what the tutorial shows.
    fn is_refused(&self) -> bool {
        self.says.iter().any(|line| line.starts_with("5"))
    }

    fn check(&self, success: bool, said: &str) -> Result<()> {
        ensure!(success != self.is_refused(), "{}: {said}", self.command);
        let mut rest = said;
        for line in &self.says {
            let at = rest.find(line.as_str());
            let at = at.with_context(|| format!("{}: no {line:?} in {said}", self.command))?;
            rest = &rest[at + line.len()..];
        }
        Ok(())
    }
}

/// Runs one; returns how many messages it has sent.
fn play(lab: &Lab, site: &Site, tutorial: &Path) -> Result<usize> {
    let places = Places::of(lab, site);
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let mut running: Option<Daemon<'_>> = None;
    let mut sent = 0;
    for step in steps(&fs::read_to_string(tutorial)?) {
        if let Some(file) = step.command.strip_prefix("smtplb check ") {
            if let Some(mut before) = running.take() {
                before.stop()?;
            }
            let config = places.apply(&fs::read_to_string(examples.join(file))?);
            let path = lab.folder().join(file);
            fs::write(&path, &config)?;
            let mut check = Command::new(daemon::program()?);
            let output = lab.balancer.output(check.arg("check").arg(&path))?;
            step.check(
                output.status.success(),
                &String::from_utf8_lossy(&output.stdout),
            )?;
            let daemon = Daemon::start(lab, &config)?;
            daemon.wait_for_checked()?;
            running = Some(daemon);
        } else if step.command.starts_with("swaks ") {
            ensure!(running.is_some(), "{}: nothing runs", step.command);
            let mut shell = Command::new("sh");
            shell.args(["-c", &places.apply(&step.command)]);
            let output = lab.clients[0].namespace.output(&mut shell)?;
            let said = [output.stdout, output.stderr].concat();
            step.check(output.status.success(), &String::from_utf8_lossy(&said))?;
            sent += usize::from(!step.is_refused());
        } else {
            bail!("what is `{}`?", step.command);
        }
    }
    if let Some(mut daemon) = running {
        daemon.stop()?;
    }
    Ok(sent)
}

#[test]
fn the_tutorials_do_what_they_say() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tutorials");
        let mut tutorials: Vec<_> = fs::read_dir(folder)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        tutorials.sort();
        ensure!(tutorials.len() == 6, "one for each scenario");
        let mut seen = 0;
        for tutorial in tutorials {
            let name = tutorial.display();
            let sent = play(lab, &site, &tutorial).with_context(|| name.to_string())?;
            let arrivals = site.arrivals()?;
            let new = arrivals.len() - seen;
            ensure!(sent > 0 && new == sent, "{name}: {new} of {sent} arrived");
            seen = arrivals.len();
        }
        let in_tls = site
            .arrivals()?
            .iter()
            .filter(|arrival| arrival.tls.is_some())
            .count();
        ensure!(
            in_tls == 4,
            "{in_tls} by TLS: both bridges, passthrough, the server side"
        );
        Ok(())
    })
}
