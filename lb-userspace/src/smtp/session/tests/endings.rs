//! `line_endings = "normalize"`: whatever content holds, every member sees one message.

use super::{random::Dice, *};
use crate::model::LineEndings;

fn lenient() -> Terms {
    Terms {
        line_endings: LineEndings::Normalize,
        ..Terms::from(ClientSecurity::None)
    }
}

/// A machine in the content of a message.
fn in_data() -> Lab {
    let mut lab = Lab::new(lenient());
    lab.ehlo();
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("DATA\r\n", "354 go\r\n");
    lab
}

/// What reaches the member of content that comes in these pieces, whether it ended, and whether it was mended.
fn through(pieces: &[&[u8]]) -> (Vec<u8>, bool, bool) {
    let mut lab = in_data();
    for piece in pieces {
        lab.sends(piece);
    }
    let ended = lab.phase() == Phase::EndOfData;
    let facts = lab.session.facts();
    (lab.member, ended, facts.normalized == 1)
}

#[test]
fn bare_controls_become_lines_and_crlf_dot_crlf_alone_ends() {
    for (content, reaches) in [
        // As it came.
        (&b"a\r\n.\r\n"[..], &b"a\r\n.\r\n"[..]),
        (b".\r\n", b".\r\n"),
        (b"..\r\n.a\r\n...\r\n.\r\n", b"..\r\n.a\r\n...\r\n.\r\n"),
        // Look-alikes of the end.
        (b"a\n.\n.\r\n", b"a\r\n..\r\n..\r\n"),
        (b"a\n.\r\n.\r\n", b"a\r\n..\r\n.\r\n"),
        (b"a\r\n.\n\r\n.\r\n", b"a\r\n..\r\n\r\n.\r\n"),
        (b".\n\r\n.\r\n", b"..\r\n\r\n.\r\n"),
        (b"\n.\r\n.\r\n", b"\r\n..\r\n.\r\n"),
        (b"a\r.\r\r\n.\r\n", b"a .\r\n.\r\n"),
        (b"a\r\n.\rb\r\n.\r\n", b"a\r\n. b\r\n.\r\n"),
        (b"a\r\n.\r.\r\n.\r\n", b"a\r\n. .\r\n.\r\n"),
        (b"a\r\n.\r\r\n.\r\n", b"a\r\n..\r\n.\r\n"),
        (b"a\r\n.\r\r\rb\r\n.\r\n", b"a\r\n. b\r\n.\r\n"),
        (b"a\n\r.\r\n.\r\n", b"a\r\n .\r\n.\r\n"),
        (b"a\r\n\r.\r\n.\r\n", b"a\r\n .\r\n.\r\n"),
        (b"a\n.\r.\n.\r\n.\r\n", b"a\r\n.. .\r\n..\r\n.\r\n"),
        (b"a\r\r\n.\r\n", b"a\r\n.\r\n"),
        (b"a\n\r\n.\r\n", b"a\r\n\r\n.\r\n"),
        // Dots behind a bare LF: doubled unless they are.
        (
            b"a\n.b\n..c\n...d\r\n.\r\n",
            b"a\r\n..b\r\n..c\r\n...d\r\n.\r\n",
        ),
        (b"a\n..\r\n.\r\n", b"a\r\n..\r\n.\r\n"),
        // Ends of lines that double, and CRs in a row.
        (
            b"h: v\r\r\n\r\r\ntext\r\r\n.\r\n",
            b"h: v\r\n\r\ntext\r\n.\r\n",
        ),
        (b"a\rb\r\r\rc\r\r\r\nd\r\n.\r\n", b"a b c\r\nd\r\n.\r\n"),
        // Nothing of it ends.
        (b"a\n.\n", b"a\r\n..\r\n"),
        (b"a\r.\r", b"a ."),
        (b"a\r\n.\n", b"a\r\n..\r\n"),
        (b"a\n.\r\n", b"a\r\n..\r\n"),
        (b"a\r\n.\r\r\n", b"a\r\n..\r\n"),
    ] {
        let ends = reaches.ends_with(b"\r\n.\r\n") || reaches == b".\r\n";
        let mended = ends && content != reaches;
        let expected = (reaches.to_vec(), ends, mended);
        let shown = content.escape_ascii();
        assert_eq!(through(&[content]), expected, "{shown}");
        for cut in 1..content.len() {
            let pieces = [&content[..cut], &content[cut..]];
            assert_eq!(through(&pieces), expected, "{shown} cut at {cut}");
        }
        let bytes: Vec<_> = content.chunks(1).collect();
        assert_eq!(through(&bytes), expected, "{shown} byte by byte");
    }
}

/// How many messages a member sees that takes CR, LF and CRLF for the end of a line, in any mixture.
fn seen_by_the_most_tolerant(content: &[u8]) -> usize {
    let text = String::from_utf8_lossy(content).replace("\r\n", "\n");
    text.split(['\r', '\n']).filter(|line| *line == ".").count()
}

#[test]
fn random_content_is_one_message_for_any_member_however_it_is_cut() {
    const WORDS: &[&str] = &[
        "\r",
        "\n",
        ".",
        "\r\n",
        "\r\n.\r\n",
        "\n.\n",
        "x",
        "MAIL FROM:<evil@x>\r\n",
    ];
    for seed in 1..=20_000 {
        let mut dice = Dice::new(seed);
        let words = dice.roll(30);
        let mut content: Vec<u8> = (0..words).flat_map(|_| dice.pick(WORDS).bytes()).collect();
        content.extend_from_slice(b"\r\n.\r\n");
        // Before the first end, none; what follows it are commands.
        let end = match content.starts_with(b".\r\n") {
            true => 3,
            false => {
                content
                    .windows(5)
                    .position(|five| five == b"\r\n.\r\n")
                    .unwrap()
                    + 5
            }
        };
        let content = &content[..end];
        let shown = content.escape_ascii();
        let whole = through(&[content]);
        assert!(whole.1, "seed {seed}: {shown} does not end");
        assert_eq!(
            seen_by_the_most_tolerant(&whole.0),
            1,
            "seed {seed}: {shown}"
        );
        assert!(whole.0.ends_with(b"\r\n.\r\n") || whole.0 == b".\r\n");
        let bare = String::from_utf8_lossy(&whole.0).replace("\r\n", "");
        assert!(!bare.contains(['\r', '\n']), "seed {seed}: {shown}");
        assert_eq!(through(&dice.cut(content)), whole, "seed {seed}: {shown}");
    }
}

#[test]
fn long_content_is_mended_in_parts_that_are_bounded() {
    let content = [b"\n.".repeat(100_000), b"\r\n.\r\n".to_vec()].concat();
    let mut lab = in_data();
    let (mut at, mut sent) = (0, Vec::new());
    while at < content.len() {
        let taken = lab.session.handle_client(&content[at..], lab.now);
        assert!(taken.consumed > 0);
        at += taken.consumed;
        let to_member = lab.session.to_member();
        assert!(
            to_member.len() <= 33 * 1024,
            "{} bytes wait",
            to_member.len()
        );
        sent.append(to_member);
    }
    assert_eq!(
        sent,
        [b"\r\n..".repeat(100_000), b"\r\n.\r\n".to_vec()].concat()
    );
}

#[test]
fn nul_is_refused_and_commands_and_chunks_are_as_ever() {
    for content in [
        &b"a\nb\0\r\n.\r\n"[..],
        b"a\r\0\r\n.\r\n",
        b"\n\0.\r\n\r\n.\r\n",
        b"\0\r\n.\r\n",
    ] {
        let mut lab = in_data();
        lab.sends(content);
        assert!(
            lab.heard().starts_with("554 5.6.0 "),
            "{}",
            content.escape_ascii()
        );
        assert_eq!((lab.end, lab.aborted), (Some(End::BareControl), true));
        assert_eq!(lab.session.facts().normalized, 0);
    }
    let mut lab = Lab::new(lenient());
    lab.ehlo();
    lab.refused("NOOP\nRSET\r\n", "500 5.5.2 ");
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("BDAT 7 LAST\r\n\n.\n\r.\r\0", "250 taken\r\n");
    assert_eq!(
        (lab.session.facts().messages, lab.session.facts().normalized),
        (1, 0)
    );
}

#[test]
fn each_message_counts_once() {
    let mut lab = Lab::new(lenient());
    lab.ehlo();
    for (content, count) in [
        ("a\nb\rc\r\n.\r\n", 1),
        ("a\r\n.\r\n", 1),
        ("\n\r\n.\r\n", 2),
    ] {
        lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
        lab.exchange("DATA\r\n", "354 go\r\n");
        lab.sends(content);
        lab.says("250 taken\r\n");
        lab.heard();
        lab.reached();
        assert_eq!(lab.session.facts().normalized, count);
    }
    assert_eq!(lab.session.facts().messages, 3);
}
