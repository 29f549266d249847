//! Clients that mean harm, or know no better: a proper reply, bounded memory, and the next client is served.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options},
    lab::Family,
    sink::Event,
    wait::pause,
};

use crate::scene::{Scene, play_site};

/// What a client sends behind the greeting, piece by piece.
struct Case {
    what: &'static str,
    port: u16,
    pieces: Vec<Vec<u8>>,
    /// The last reply starts with one of these; empty where closing alone will do.
    replies: &'static [&'static str],
}

fn cases() -> Vec<Case> {
    let text = |text: &str| text.as_bytes().to_vec();
    let mail = "MAIL FROM:<evil@lab.example>\r\nRCPT TO:<inbox@lab.example>\r\nDATA\r\n";
    vec![
        Case {
            what: "commands behind STARTTLS in one segment",
            port: 587,
            pieces: vec![text("EHLO evil\r\n"), text(&format!("STARTTLS\r\n{mail}"))],
            replies: &["5"],
        },
        Case {
            what: "commands behind STARTTLS in one segment, where TLS is optional",
            port: 25,
            pieces: vec![text("EHLO evil\r\n"), text(&format!("STARTTLS\r\n{mail}"))],
            replies: &["5"],
        },
        Case {
            what: "commands behind STARTTLS in segments of their own",
            port: 587,
            pieces: vec![text("EHLO evil\r\n"), text("STARTTLS\r\n"), text(mail)],
            replies: &["220", "5"],
        },
        Case {
            what: "a megabyte without an end of line",
            port: 25,
            pieces: vec![vec![b'x'; 1 << 20]],
            replies: &["5", "421"],
        },
        Case {
            what: "binary junk",
            port: 25,
            pieces: vec![(0..=255).cycle().take(100_000).collect()],
            replies: &["5", "421"],
        },
        Case {
            what: "a ClientHello on a plaintext port",
            port: 25,
            pieces: vec![CLIENT_HELLO.to_vec()],
            // Nobody who speaks TLS could read a reply; the log names the reason.
            replies: &["220"],
        },
        Case {
            what: "no word at all",
            port: 587,
            pieces: Vec::new(),
            replies: &["220"],
        },
    ]
}

/// The first bytes of a TLS 1.2 handshake: record, handshake, version, the start of a random.
const CLIENT_HELLO: &[u8] = &[
    0x16, 0x03, 0x01, 0x00, 0xc8, 0x01, 0x00, 0x00, 0xc4, 0x03, 0x03, 0x0d, 0x0a, 0x20, 0x00, 0xff,
    0x0a,
];

#[test]
fn hostile_clients_are_answered_and_harm_nobody() -> Result<()> {
    play_site(|scene| {
        let before = resident_kib(scene)?;
        for case in cases() {
            for family in Family::ALL {
                attack(
                    scene,
                    &case,
                    SocketAddr::new(family.virtual_address(), case.port),
                )
                .context(case.what)?;
            }
        }
        let grown = resident_kib(scene)?.saturating_sub(before);
        ensure!(grown < 32 << 10, "memory grew by {grown} KiB");
        for event in scene
            .site
            .members
            .iter()
            .flat_map(|member| member.events().unwrap_or_default())
        {
            ensure!(
                !matches!(event, Event::Message(_)),
                "a member took {event:?}"
            );
        }
        for (port, mode) in [(587, Mode::Starttls), (25, Mode::Plain)] {
            let options = Options {
                mode,
                ..Options::to((Family::V4.virtual_address(), port).into())
            };
            scene.send(&scene.lab.clients[1], &options)?;
        }
        let log = scene.daemon.log();
        ensure!(!log.contains("panicked"), "{log}");
        Ok(())
    })
}

fn attack(scene: &Scene<'_>, case: &Case, server: SocketAddr) -> Result<()> {
    scene.lab.clients[0].namespace.enter(|| {
        let mut tcp = TcpStream::connect_timeout(&server, Duration::from_secs(5))?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(Duration::from_secs(10)))?;
        tcp.set_write_timeout(Some(Duration::from_secs(10)))?;
        let mut heard = read_some(&mut tcp)?;
        for piece in &case.pieces {
            // A refusal may come, and the connection close, before everything is sent.
            if tcp.write_all(piece).is_err() {
                break;
            }
            pause(Duration::from_millis(50));
        }
        let _ = tcp.shutdown(Shutdown::Write);
        while let Ok(more) = read_some(&mut tcp) {
            if more.is_empty() {
                break;
            }
            heard.push_str(&more);
        }
        let last = heard.lines().next_back().unwrap_or_default();
        let fits =
            case.replies.is_empty() || case.replies.iter().any(|start| last.starts_with(start));
        ensure!(fits, "{server} said {heard:?}");
        Ok(())
    })
}

/// The next bytes; empty at the end.
fn read_some(tcp: &mut TcpStream) -> Result<String> {
    let mut buffer = [0; 4096];
    let count = tcp.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
}

fn resident_kib(scene: &Scene<'_>) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", scene.daemon.id()))?;
    status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse()
                .ok()
        })
        .context("no VmRSS")
}
