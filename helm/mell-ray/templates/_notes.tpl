{{- define "mell-ray.notes" -}}
{{- $service := include "mell-ray.serveService" . -}}
{{- $name := include "mell-ray.fullname" . -}}
{{- $models := list -}}
{{- range .Values.serve.models }}{{ $models = append $models .model_loading_config.model_id }}{{ end -}}
{{- $prefix := .Values.serve.routePrefix | trimSuffix "/" -}}
RayService {{ $name }} is being made. It needs KubeRay 1.7 or newer in the cluster.

  kubectl --namespace {{ .Release.Namespace }} get rayservice {{ $name }} --watch

Once its condition Ready is True, it serves {{ join ", " $models }}:

  kubectl --namespace {{ .Release.Namespace }} port-forward service/{{ $service }} 8000
  curl http://127.0.0.1:8000{{ $prefix }}/v1/chat/completions \
    -H 'Content-Type: application/json' \
    {{- if .Values.apiKeys.clientsSecret }}
    -H 'Authorization: Bearer KEY' \
    {{- end }}
    -d '{"model": "{{ first $models }}", "messages": [{"role": "user", "content": "Hello"}]}'

Within the cluster: http://{{ $service }}.{{ .Release.Namespace }}:8000{{ $prefix }}/v1
{{- range .Values.ingress.enabled | ternary .Values.ingress.hosts list }}
By the Ingress: {{ .host }}
{{- end }}
{{- range .Values.httpRoute.enabled | ternary .Values.httpRoute.hostnames list }}
By the HTTPRoute: {{ . }}
{{- end }}

{{- if .Values.apiKeys.clientsSecret }}
KEY is a line of Secret {{ .Values.apiKeys.clientsSecret }}; `mell-ray status` takes it from MELL_API_KEY.
{{ end }}
See which request runs on which GPU:

  mell-ray status --url http://127.0.0.1:8000{{ $prefix }}

Test the installation: helm test {{ .Release.Name }} --namespace {{ .Release.Namespace }}
{{- if .Values.autoscaler.enabled }}

Worker groups and the pods they may have (an empty group waits for its first request):
{{- range $group, $settings := include "mell-ray.groups" . | fromYaml }}
  {{ $group }}: {{ int $settings.minReplicas }} to {{ int $settings.maxReplicas }}, {{ int $settings.gpusPerPod }} GPUs each, given back after {{ int (hasKey $settings "idleTimeoutSeconds" | ternary $settings.idleTimeoutSeconds $.Values.autoscaler.idleTimeoutSeconds) }} s without work
{{- end }}
{{- end }}
{{- if ne .Values.rayAuth.mode "token" }}

WARNING: Ray's own ports ask for no token (rayAuth.mode). Who reaches the head can run code on it.
{{- end }}
{{- if not .Values.networkPolicy.enabled }}

WARNING: there is no NetworkPolicy. In HAProxy mode ingress replicas listen on all interfaces.
{{- end }}
{{- if and .Values.metrics.prometheusRule.enabled (not (.Files.Get "files/alerts.yaml")) }}

WARNING: metrics.prometheusRule is on, and this chart was packed without files/alerts.yaml.
{{- end }}
{{- end -}}
