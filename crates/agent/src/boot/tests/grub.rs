use std::collections::BTreeMap;

use crate::boot::grub::{GrubBoot, GrubFile, GrubHost, GrubOutcome, SearchBy, run};
use crate::boot::tests::support::cases;
use proptest::prelude::*;

/// One device, `hd0,gpt1`, with these files; UUID "u-1".
#[derive(Default)]
struct Host(BTreeMap<&'static str, String>);

impl GrubHost for Host {
    fn read(&self, device: &str, path: &str) -> Option<String> {
        (device == "hd0,gpt1").then(|| self.0.get(path).cloned())?
    }
    fn is_file(&self, device: &str, path: &str) -> bool {
        self.read(device, path).is_some()
    }
    fn is_directory(&self, _: &str, path: &str) -> bool {
        path == "/boot"
    }
    fn size(&self, device: &str, path: &str) -> Option<u64> {
        self.read(device, path).map(|text| text.len() as u64)
    }
    fn search(&self, by: SearchBy, value: &str) -> Option<String> {
        (by == SearchBy::Uuid && value == "u-1").then(|| "hd0,gpt1".to_owned())
    }
}

fn boot(host: &Host, text: &str) -> Result<GrubBoot, String> {
    match run(host, "hd0,gpt1", "/boot/grub", text)? {
        GrubOutcome::Boot(boot) => Ok(boot),
        GrubOutcome::Bls { .. } => Err("bls".into()),
    }
}

fn cmdline(text: &str) -> String {
    boot(&Host::default(), text).unwrap().cmdline
}

/// The shape of what Debian's and Ubuntu's grub-mkconfig write.
const MKCONFIG: &str = r#"
### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  else
    insmod efi_gop; insmod efi_uga
  fi
}
for candidate in $prefix/a $prefix/b; do
  if [ -f $candidate ]; then source $candidate; fi
done
terminal_output gfxterm
if [ "${recordfail}" = 1 ] ; then
  set timeout=30
fi
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux $menuentry_id_option 'gnulinux-simple-u-1' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	set root='hd0,gpt9'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  u-1
	else
	  search --no-floppy --fs-uuid --set=root u-none
	fi
	echo	'Loading Linux 6.1.0-56 ...'
	linux	/boot/vmlinuz-6.1.0-56 root=UUID=u-1 ro  quiet "dyndbg=file a.c +p" $extra
	echo	'Loading initial ramdisk ...'
	initrd	/boot/microcode.img /boot/initrd.img-6.1.0-56
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-u-1' {
	menuentry 'one' --id 'first' { linux /boot/one a=1 }
	menuentry 'two (recovery)' --id 'second' {
		linux /boot/two a=2
	}
}
"#;

#[test]
fn a_generated_configuration_boots_its_default_entry() {
    let found = boot(&Host::default(), MKCONFIG).unwrap();
    let file = |path: &str| GrubFile { device: "hd0,gpt1".into(), path: path.into() };
    assert_eq!(found.kernel, file("/boot/vmlinuz-6.1.0-56"));
    assert_eq!(found.cmdline, "root=UUID=u-1 ro quiet dyndbg=file a.c +p");
    assert_eq!(found.initrds, [file("/boot/microcode.img"), file("/boot/initrd.img-6.1.0-56")]);
}

#[test]
fn the_environment_block_chooses_entries_of_submenus() {
    for (chosen, wanted) in [
        ("gnulinux-advanced-u-1>second", "a=2"),
        ("1>0", "a=1"),
        ("Advanced options>two (recovery)", "a=2"),
        ("1", "a=1"),
        ("no such entry", "root=UUID=u-1 ro quiet dyndbg=file a.c +p"),
    ] {
        let env = format!("# GRUB Environment Block\nnext_entry={chosen}\n#####");
        let host = Host([("/boot/grub/grubenv", env)].into());
        assert_eq!(boot(&host, MKCONFIG).unwrap().cmdline, wanted, "{chosen}");
    }
}

#[test]
fn words_are_split_as_grub_does() {
    assert_eq!(cmdline("set a='x  y'\nlinux /k $a \"$a\" ${a}z '$a' b\\ c \\$a"), "x y x  y x yz $a b c $a");
    assert_eq!(cmdline("linux /k a=\"b c\"d # comment"), "a=b cd");
    assert_eq!(cmdline("linux /k one \\\n two"), "one two");
    assert_eq!(cmdline("set empty=\nlinux /k $empty \"\" x"), " x");
}

#[test]
fn conditions_follow_test() {
    for (condition, holds) in [
        ("[ a = a ]", true),
        ("[ a = b -o 2 -gt 1 ]", true),
        ("[ a = a -a 2 -lt 1 ]", false),
        ("[ ! -e /nothing ]", true),
        ("[ -d /boot ]", true),
        ("[ -n \"$nothing\" ]", false),
        ("test -z \"$nothing\"", true),
        ("false", false),
        ("! false", true),
    ] {
        let text = format!("if {condition}; then linux /k yes; else linux /k no; fi");
        assert_eq!(cmdline(&text) == "yes", holds, "{condition}");
    }
}

#[test]
fn scripts_that_never_end_are_stopped() {
    for text in [
        "while true; do set a=1; done",
        "until false; do true; done",
        "function f { f; }\nf",
        "source /boot/grub/self",
        "set a=xxxxxxxxxxxxxxxx\nwhile true; do set a=\"$a$a\"; done",
        "menuentry a { configfile /boot/grub/self }",
    ] {
        let host = Host([("/boot/grub/self", "source /boot/grub/self".to_owned())].into());
        assert!(boot(&host, text).is_err(), "{text}");
    }
    assert!(boot(&Host::default(), &"if true; then ".repeat(1000)).is_err());
}

#[test]
fn broken_text_names_its_line() {
    for (text, wanted) in
        [("\n\nfi", "no menu"), ("\nif true; then", "line 2"), ("a\n'b", "line 2"), ("\n}", "line 2"), ("\"", "line 1")]
    {
        let error = boot(&Host::default(), text).unwrap_err();
        assert!(error.contains(wanted), "{text:?}: {error}");
    }
}

#[test]
fn blscfg_hands_over_with_its_variables() {
    let host = Host([("/boot/grub/grubenv", "saved_entry=abc-6.9\nkernelopts=quiet\n".to_owned())].into());
    let outcome = run(&host, "hd0,gpt1", "/boot/grub", "load_env\nset default=\"${saved_entry}\"\nblscfg").unwrap();
    let GrubOutcome::Bls { default, variables } = outcome else { panic!("{outcome:?}") };
    assert_eq!((default.as_str(), variables["kernelopts"].as_str()), ("abc-6.9", "quiet"));
}

proptest! {
    #![proptest_config(cases(400))]
    #[test]
    fn no_text_makes_the_interpreter_panic(text in r#"([a-z]|[ \n;'"$\{\}\\#=]|if |then |else |fi |while |do |done |menuentry |linux |set |\[ | \]|\$a){0,120}"#) {
        let _ = boot(&Host::default(), &text);
    }

    #[test]
    fn no_change_of_a_real_configuration_makes_it_panic(at in 0usize..2400, cut in 0usize..40, insert in "[ -~\n]{0,8}") {
        let at = at.min(MKCONFIG.len());
        let end = (at + cut).min(MKCONFIG.len());
        let _ = boot(&Host::default(), &format!("{}{insert}{}", &MKCONFIG[..at], &MKCONFIG[end..]));
    }
}
