//! The mail clients that everybody has: curl, swaks, openssl.

use std::{
    fs,
    io::{BufRead, BufReader, Read as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    certs,
    client::{Mode, Outcome, stuffed},
    lab::Namespace,
    mail::{Message, digest},
    wait::wait_for,
};

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// libcurl's SMTP.
    Curl,
    /// Perl's, with OpenSSL.
    Swaks,
    /// `openssl s_client`, spoken through by hand.
    Openssl,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Curl, Self::Swaks, Self::Openssl];

    /// As it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Curl => "curl",
            Self::Swaks => "swaks",
            Self::Openssl => "openssl",
        }
    }

    /// Whether it can be asked to do this.
    pub fn can(self, mode: Mode) -> bool {
        self != Self::Openssl || mode != Mode::Plain
    }
}

/// Where programs send from, and to.
#[derive(Debug, Clone)]
pub struct Errand<'a> {
    /// The client's machine.
    pub from: &'a Namespace,
    /// The server.
    pub server: SocketAddr,
    /// When to use TLS.
    pub mode: Mode,
    /// The authority to trust, PEM.
    pub ca: &'a Path,
    /// For files.
    pub folder: &'a Path,
}

impl Errand<'_> {
    /// Sends one message once.
    ///
    /// # Errors
    /// When the program cannot be run at all; that mail is refused is an outcome.
    pub fn send(&self, program: Program, message: &Message) -> Result<Outcome> {
        let text = message.text();
        let said = match program {
            Program::Curl => self.curl(message, &text),
            Program::Swaks => self.swaks(message, &text),
            Program::Openssl => self.openssl(&text),
        };
        let digest = digest::of_message(&text);
        let (ok, reply) = match said {
            Ok(reply) => (true, reply),
            Err(error) => (false, format!("{error:#}")),
        };
        Ok(Outcome {
            id: message.id.clone(),
            size: digest.size,
            sha256: digest.whole,
            body_sha256: digest.body,
            ok,
            tls: version(&reply),
            reply,
            attempts: 1,
            certificate: None,
            greeting: String::new(),
        })
    }

    fn curl(&self, message: &Message, text: &[u8]) -> Result<String> {
        let file = self.file(message, text)?;
        let scheme = if self.mode == Mode::Implicit {
            "smtps"
        } else {
            "smtp"
        };
        let port = self.server.port();
        let mut curl = Command::new("curl");
        curl.args(["--verbose", "--silent", "--show-error", "--max-time", "60"]);
        curl.args([
            "--mail-from",
            "sender@lab.example",
            "--mail-rcpt",
            "inbox@lab.example",
        ]);
        curl.arg("--cacert")
            .arg(self.ca)
            .arg("--upload-file")
            .arg(&file);
        if self.mode == Mode::Starttls {
            curl.arg("--ssl-reqd");
        }
        // By the name of the certificate, to the address of the lab.
        let host = match self.server {
            SocketAddr::V4(address) => address.ip().to_string(),
            SocketAddr::V6(address) => format!("[{}]", address.ip()),
        };
        curl.arg("--connect-to").arg(format!("::{host}:{port}"));
        curl.arg(format!(
            "{scheme}://{}:{port}/curl.lab.example",
            certs::MAIL_NAME
        ));
        self.finish(&mut curl)
    }

    fn swaks(&self, message: &Message, text: &[u8]) -> Result<String> {
        // Byte for byte as it goes over the wire: swaks would replace tokens and ends of lines otherwise.
        let file = self.file(message, &stuffed(text))?;
        let mut swaks = Command::new("swaks");
        swaks.arg("--server").arg(self.server.ip().to_string());
        swaks.arg("--port").arg(self.server.port().to_string());
        swaks.args(["--from", "sender@lab.example", "--to", "inbox@lab.example"]);
        swaks.args([
            "--ehlo",
            "swaks.lab.example",
            "--timeout",
            "60",
            "--no-data-fixup",
            "--suppress-data",
        ]);
        swaks.arg("--data").arg(format!("@{}", file.display()));
        if self.server.is_ipv6() {
            swaks.arg("-6");
        }
        match self.mode {
            Mode::Plain => &mut swaks,
            Mode::Starttls => swaks
                .args(["--tls", "--tls-verify", "--tls-ca-path"])
                .arg(self.ca),
            Mode::Implicit => swaks
                .args(["--tls-on-connect", "--tls-verify", "--tls-ca-path"])
                .arg(self.ca),
        };
        self.finish(&mut swaks)
    }

    fn openssl(&self, text: &[u8]) -> Result<String> {
        let mut talk = Talk::open(self)?;
        talk.say("EHLO openssl.lab.example", '2')?;
        talk.say("MAIL FROM:<sender@lab.example>", '2')?;
        talk.say("RCPT TO:<inbox@lab.example>", '2')?;
        talk.say("DATA", '3')?;
        talk.write(&stuffed(text))?;
        let reply = talk.reply('2')?;
        talk.say("QUIT", '2')?;
        Ok(format!("{}{reply}", talk.errors()))
    }

    fn file(&self, message: &Message, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.folder.join(format!("{}.eml", message.id));
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Runs a program that says in its output what happened.
    fn finish(&self, command: &mut Command) -> Result<String> {
        let output = self.from.output(command)?;
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(output.status.success(), "{}: {said}", output.status);
        Ok(said)
    }
}

/// `TLSv1.3` or `TLSv1.2`, when the text says so.
fn version(said: &str) -> Option<String> {
    ["TLSv1.3", "TLSv1.2"]
        .into_iter()
        .find(|version| said.contains(version))
        .map(str::to_owned)
}

/// A conversation through `openssl s_client`.
struct Talk {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talk {
    /// Connects and waits for the greeting; after STARTTLS there is none any more.
    fn open(errand: &Errand<'_>) -> Result<Self> {
        let mut openssl = Command::new("openssl");
        // -quiet also keeps it from taking a line that begins with R for a command of its own.
        openssl.args(["s_client", "-quiet", "-verify_return_error", "-brief"]);
        openssl.args([
            "-verify_hostname",
            certs::MAIL_NAME,
            "-servername",
            certs::MAIL_NAME,
        ]);
        openssl
            .arg("-connect")
            .arg(errand.server.to_string())
            .arg("-CAfile")
            .arg(errand.ca);
        match errand.mode {
            Mode::Implicit => {}
            Mode::Starttls => {
                openssl.args(["-starttls", "smtp"]);
            }
            Mode::Plain => bail!("openssl always speaks TLS"),
        }
        openssl
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = errand.from.spawn(&mut openssl)?;
        let input = child.stdin.take().context("no stdin")?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut talk = Self {
            child,
            input,
            output,
        };
        if errand.mode == Mode::Implicit {
            talk.reply('2')?;
        }
        Ok(talk)
    }

    fn say(&mut self, line: &str, good: char) -> Result<String> {
        self.write(format!("{line}\r\n").as_bytes())?;
        self.reply(good).with_context(|| line.to_owned())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.input.write_all(bytes)?;
        Ok(self.input.flush()?)
    }

    /// The last line of the next reply.
    fn reply(&mut self, good: char) -> Result<String> {
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                bail!("openssl ended: {}", self.errors());
            }
            if line.as_bytes().get(3) == Some(&b'-') {
                continue;
            }
            ensure!(line.starts_with(good), "{}", line.trim_end());
            return Ok(line.trim_end().to_owned());
        }
    }

    /// What it said about the handshake; ends it.
    fn errors(&mut self) -> String {
        // After QUIT it ends by itself; after a failure it may be waiting for us.
        let ended = wait_for(Duration::from_secs(5), "openssl to end", || {
            self.child.try_wait().ok().flatten()
        });
        if ended.is_err() {
            let _ = self.child.kill();
        }
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
