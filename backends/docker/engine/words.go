package engine

import (
	"regexp"
	"slices"
	"strings"
)

// Unexecutable says whether an error of an engine means that it has found nothing to execute, or not what can be. It has no code for that.
func Unexecutable(text string) bool {
	return slices.ContainsFunc([]string{"exec: ", "chdir to cwd", "executable file not found", "exec format error", "exec failed"}, func(part string) bool {
		return strings.Contains(text, part)
	})
}

// Unmountable says where in a container nothing can be mounted, and why, if that is what an error of an engine means; why is empty for any
// other. Only what the container itself has at that place counts: runc names it in double quotes, crun in backquotes.
func Unmountable(text string) (place, why string) {
	found := regexp.MustCompile("(?is)(?:to rootfs at \"|(?:to|open|openat2|mkdir|creating) `)/?([^\"`]+)[\"`].*" +
		"(not a directory|is a directory|inside /proc|too many levels of symbolic links|file name too long)").FindStringSubmatch(text)
	if found == nil {
		return "", ""
	}
	return "/" + found[1], map[string]string{
		"not a directory":                   "a file is there or on the way to it where a folder is wanted, or a folder where a file is; want a path that is the same in the image, or not in it",
		"is a directory":                    "a folder is there where a file is wanted; want a path that is a file in the image, or not in it",
		"inside /proc":                      "a link leads into /proc; want a path that stays outside",
		"too many levels of symbolic links": "links lead in a circle; want a path without",
		"file name too long":                "a name in it is too long; want at most 255 bytes between two slashes",
	}[strings.ToLower(found[2])]
}
