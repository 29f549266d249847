//! Sessions of the proxy plane that something ends: a stop within a message and between messages, a member that dies;
//! and what the session log says of them.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::{
    daemon::config::{ClientTls, Config},
    lab::{Family, Lab, Plan},
    member::Mta,
    sink::Event,
    wait::wait_until,
};

use crate::scene::{Scene, play};

const PATIENCE: Duration = Duration::from_secs(30);

/// A plain proxy on 25 with all members, and these lines in `[session]`.
fn config(lab: &Lab, session: &str) -> Config {
    let mut config = Config::new(lab, "tc");
    config.pool(lab, "mx", Family::V4, 25, None);
    config.proxy(
        "mx",
        Family::V4.virtual_address(),
        25,
        "mx",
        ClientTls::None,
    );
    config.raw(&format!("[session]\n{session}"));
    config
}

fn play_plain(session: &str, test: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
    play(
        Plan::TWO_ARM,
        Mta::Sink,
        |lab, _| config(lab, session),
        test,
    )
}

/// A client that says one thing after the other.
struct Client(BufReader<TcpStream>);

impl Client {
    fn open(scene: &Scene<'_>) -> Result<Self> {
        let server = SocketAddr::new(Family::V4.virtual_address(), 25);
        let tcp = scene.lab.clients[0]
            .namespace
            .enter(|| Ok(TcpStream::connect_timeout(&server, PATIENCE)?))?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self(BufReader::new(tcp));
        client.expect("220")?;
        Ok(client)
    }

    fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    fn expect(&mut self, start: &str) -> Result<String> {
        let mut line = String::new();
        loop {
            line.clear();
            self.0.read_line(&mut line)?;
            if line.as_bytes().get(3) != Some(&b'-') {
                break;
            }
        }
        ensure!(line.starts_with(start), "{line:?} in place of {start}");
        Ok(line)
    }

    fn ask(&mut self, line: &str, start: &str) -> Result<()> {
        self.send(&format!("{line}\r\n"))?;
        self.expect(start).map(drop)
    }

    /// Up to the first lines of a message.
    fn begin_message(&mut self, id: &str) -> Result<()> {
        self.ask("EHLO c", "250")?;
        self.ask("MAIL FROM:<a@lab.example>", "250")?;
        self.ask("RCPT TO:<b@lab.example>", "250")?;
        self.ask("DATA", "354")?;
        self.send(&format!("Message-ID: <{id}>\r\n\r\nfirst line\r\n"))
    }

    fn is_closed(&mut self) -> Result<bool> {
        Ok(self.0.fill_buf()?.is_empty())
    }
}

#[test]
fn a_drained_member_has_its_time_for_a_message_and_no_more() -> Result<()> {
    play_plain("drain_timeout = \"3s\"", |scene| {
        let mut slow = Client::open(scene)?;
        slow.begin_message("slow")?;
        let mut quick = Client::open(scene)?;
        quick.begin_message("quick")?;
        for member in &scene.lab.members {
            let member = format!("mx/{}", member.name);
            scene
                .daemon
                .good_verb(&["drain", &member, "--deadline", "0s"])?;
        }
        quick.send("last line\r\n.\r\n")?;
        quick.expect("250")?;
        quick.expect("421 4.3.2")?;
        slow.expect("421 4.3.2")?;
        ensure!(slow.is_closed()?);
        scene
            .daemon
            .wait_for_log(" 1 sessions were cut within a message")?;
        let arrivals = scene.site.arrivals()?;
        let ids: Vec<_> = arrivals.iter().map(|it| it.id.as_deref()).collect();
        ensure!(ids == [Some("quick")], "{ids:?}");
        Ok(())
    })
}

/// The words `name=value` of the log line of the only session that ended this way.
fn logged(scene: &Scene<'_>, end: &str) -> Result<String> {
    let end = format!(" end={end} ");
    wait_until(PATIENCE, &end, || scene.daemon.log().contains(&end))?;
    let log = scene.daemon.log();
    let mut lines = log.lines().filter(|line| line.contains(&end));
    let line = lines.next().unwrap_or_default().to_owned();
    ensure!(lines.next().is_none(), "more than one:\n{log}");
    Ok(line)
}

#[test]
fn a_stop_waits_for_messages_and_for_nothing_else() -> Result<()> {
    play_plain("drain_timeout = \"60s\"", |scene| {
        let mut idle = Client::open(scene)?;
        idle.ask("EHLO c", "250")?;
        let mut sending = Client::open(scene)?;
        sending.begin_message("within")?;
        scene.daemon.signal(Signal::TERM)?;
        idle.expect("421 4.3.2")?;
        ensure!(idle.is_closed()?);
        // Long behind the other's end, the message goes on.
        sending.send("last line\r\n.\r\n")?;
        sending.expect("250")?;
        sending.expect("421 4.3.2")?;
        // A second signal would cut what is left.
        wait_until(PATIENCE, "the end of both", || {
            let log = scene.daemon.log();
            log.contains("2 sessions ended in order, 0 were cut")
        })?;
        scene.daemon.stop()?;
        let arrivals = scene.site.arrivals()?;
        ensure!(arrivals.len() == 1, "{arrivals:?}");
        Ok(())
    })
}

#[test]
fn a_message_that_outlasts_the_drain_is_nobodys() -> Result<()> {
    play_plain("drain_timeout = \"1s\"", |scene| {
        let mut sending = Client::open(scene)?;
        sending.begin_message("endless")?;
        let begun = Instant::now();
        scene.daemon.signal(Signal::TERM)?;
        sending.expect("421 4.3.2")?;
        ensure!(
            begun.elapsed() >= Duration::from_secs(1),
            "cut before its time"
        );
        ensure!(sending.is_closed()?);
        scene.daemon.stop()?;
        ensure!(scene.site.arrivals()?.is_empty(), "half a message arrived");
        Ok(())
    })
}

#[test]
fn a_member_that_dies_within_a_message_has_taken_nothing() -> Result<()> {
    play_plain("drain_timeout = \"30s\"", |scene| {
        let mut first = Client::open(scene)?;
        first.begin_message("lost")?;
        let used = |scene: &Scene<'_>| {
            let busy = |member: &&tests::member::Member| {
                let events = member.events().unwrap_or_default();
                events
                    .iter()
                    .any(|event| matches!(event, Event::Connect { .. }))
            };
            scene.site.members.iter().position(|member| busy(&member))
        };
        wait_until(PATIENCE, "a member to be used", || used(scene).is_some())?;
        let at = used(scene).unwrap_or_default();
        let host = &scene.lab.members[at];
        scene.site.members[at].crash(host)?;
        first.expect("451 4.4.2")?;
        ensure!(first.is_closed()?);
        let line = logged(scene, "member-closed")?;
        for word in [" by=member ", " phase=data", " messages=0 ", " code=451 "] {
            ensure!(line.contains(word), "{line} lacks{word}");
        }
        ensure!(scene.site.arrivals()?.is_empty());
        // The next one is served by somebody else.
        let mut next = Client::open(scene)?;
        next.begin_message("taken")?;
        next.send(".\r\n")?;
        next.expect("250")?;
        let arrivals = scene.site.arrivals()?;
        ensure!(arrivals.len() == 1 && arrivals[0].id.as_deref() == Some("taken"));
        Ok(())
    })
}

/// The sink knows no AUTH; what a client says of itself passes by all the same.
#[test]
fn secrets_and_content_are_in_no_log_and_no_view() -> Result<()> {
    const SECRETS: [&str; 4] = [
        "c2VjcmV0LXVzZXI=",
        "aGlkZGVuLXBhc3M=",
        "lines-of-content",
        "who@lab.example",
    ];
    play_plain("drain_timeout = \"5s\"", |scene| {
        let mut client = Client::open(scene)?;
        client.ask("EHLO teller.example", "250")?;
        client.ask(&format!("AUTH PLAIN {}", SECRETS[0]), "5")?;
        client.ask("AUTH LOGIN", "5")?;
        client.ask(SECRETS[1], "5")?;
        client.ask("MAIL FROM:<who@lab.example>", "250")?;
        let sessions = scene.daemon.good_verb(&["show", "sessions"])?;
        ensure!(sessions.contains("mail"), "{sessions}");
        let mut shown = sessions;
        shown += &scene.daemon.good_verb(&["show", "sessions", "--json"])?;
        client.ask("RCPT TO:<b@lab.example>", "250")?;
        client.ask("DATA", "354")?;
        client.send("lines-of-content\r\n.\r\n")?;
        client.expect("250")?;
        client.ask("QUIT", "221")?;
        let line = logged(scene, "quit")?;
        for word in [
            " generation=1 ",
            " virtual_server=mx ",
            " client=10.71.0.11:",
            " local=10.71.0.100:25 ",
            " member=m",
            " snat=10.72.0.1 ",
            " wait_ms=0 ",
            " connect_ms=",
            " greeting_ms=",
            " tls=none ",
            " starttls=none ",
            " helo=teller.example ",
            " messages=1 ",
            " recipients=1 ",
            " bytes_in=",
            " bytes_out=",
            " duration_ms=",
            " code=221 ",
            " by=client ",
            " phase=command",
        ] {
            ensure!(line.contains(word), "{line} lacks{word}");
        }
        shown += &scene.daemon.good_verb(&["stats"])?;
        shown += &scene.daemon.log();
        for secret in SECRETS {
            ensure!(!shown.contains(secret), "{secret} is in\n{shown}");
        }
        Ok(())
    })
}
