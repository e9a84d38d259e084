{{/* The Serve config file that KubeRay hands to Ray. */}}
{{- define "mell-ray.serveConfig" -}}
{{- $values := .Values.serve -}}
{{- $mell := deepCopy $values.mell -}}
{{- range $list, $secret := include "mell-ray.keySecrets" . | fromYaml -}}
{{- $auth := $mell.auth | default dict -}}
{{- $source := get $auth $list | default dict -}}
{{- $files := append ($source.files | default list) (printf "%s/%s" (include "mell-ray.keysPath" $) $list) -}}
{{- $_ := set $mell "auth" (set $auth $list (set $source "files" $files)) -}}
{{- end -}}
{{- $application := dict
  "name" $values.appName
  "route_prefix" $values.routePrefix
  "import_path" "mell_ray.serving:build_openai_app"
  "args" (dict "llm_configs" $values.models "mell" $mell) -}}
{{- toYaml (dict
  "proxy_location" $values.proxyLocation
  "http_options" (dict "host" "0.0.0.0" "port" 8000)
  "logging_config" (dict "log_level" $values.logLevel "enable_access_log" $values.accessLog)
  "applications" (list $application)) -}}
{{- end -}}
